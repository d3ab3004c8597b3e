#include "dyvte/layer_norm.h"
#include "dyvte/linear.h"
#include "dyvte/packed_linear.h"
#include "dyvte/quick_gelu.h"
#include "dyvte/rms_norm.h"
#include "dyvte/silu_mul.h"
#include "launch.h"
#include "ops.h"

namespace dyvte::bind {
namespace {

// The leading dimensions of one or two tensors of the same shape, folded into [outer, inner] with one stride each.
struct Rows {
  int64_t outer = 1, inner = 1;
  int64_t outer_stride[2] = {}, inner_stride[2] = {};
};

Rows fold_rows(const View& x, const View& other) {
  Rows r;
  int folded = 0;  // how many of [outer, inner] hold a dimension
  auto extends = [&](int64_t i, int64_t count, const int64_t* stride) {
    return x.stride[i] == count * stride[0] && other.stride[i] == count * stride[1];
  };
  for (int64_t i = x.dim - 2; i >= 0; --i) {
    if (x.size[i] == 1) continue;
    const bool extends_inner = folded == 1 && extends(i, r.inner, r.inner_stride);
    if (folded == 0 || extends_inner) {
      if (folded == 0) r.inner_stride[0] = x.stride[i], r.inner_stride[1] = other.stride[i];
      r.inner *= x.size[i];
      folded = 1;
    } else if (folded == 1 || extends(i, r.outer, r.outer_stride)) {
      if (folded == 1) r.outer_stride[0] = x.stride[i], r.outer_stride[1] = other.stride[i];
      r.outer *= x.size[i];
      folded = 2;
    } else {
      fail(x.op, ": ", x.name, " must have leading dimensions that fold into at most two strides, got shape ",
           x.shape());
    }
  }
  return r;
}

RmsNormParams check_norm(const View& x, const View* residual, const View& weight, double eps) {
  if (x.dim < 1 || x.dim > kMaxDims)
    fail(x.op, ": x must have shape [..., d] with at most 8 dimensions, got ", x.shape());
  RmsNormParams p{};
  p.dtype = data_type(x);
  p.d = x.size[x.dim - 1];
  check_dense(x, x.dim - 1);
  check_shape(weight, {p.d}, "[d]");
  check_like(weight, x);
  check_dense(weight);
  check_device(x, {&weight});
  const Rows rows = fold_rows(x, residual ? *residual : x);
  p.x = x.data;
  p.weight = weight.data;
  p.outer = rows.outer;
  p.inner = rows.inner;
  p.x_outer = rows.outer_stride[0];
  p.x_inner = rows.inner_stride[0];
  if (residual) {
    p.residual = residual->data;
    p.res_outer = rows.outer_stride[1];
    p.res_inner = rows.inner_stride[1];
  }
  p.eps = static_cast<float>(eps);
  return p;
}

Tensor run_norm(RmsNormParams p, const View& x) {
  Tensor out = empty(x.size, x.dim, x.dtype, x);
  p.out = out.data_ptr();
  if (x.numel() > 0) DYVTE_LAUNCH(x, p, rms_norm);
  return out;
}

void check_same(const View& other, const View& x) {
  bool same = other.dim == x.dim;
  for (int64_t i = 0; same && i < other.dim; ++i) same = other.size[i] == x.size[i];
  if (!same) fail(x.op, ": ", other.name, " must have the shape of x, ", x.shape(), ", got ", other.shape());
  check_like(other, x);
  check_device(x, {&other});
}

RmsNormParams check_add_norm(const View& residual, const View& x, const View& weight, double eps) {
  check_same(residual, x);
  if (residual.dim > 0) check_dense(residual, residual.dim - 1);
  return check_norm(x, &residual, weight, eps);
}

LayerNormParams check_layer_norm(const View& x, const View& weight, const View& bias, double eps) {
  LayerNormParams p{};
  p.dtype = data_type(x);
  check_shape(x, {-1, -1}, "[N, d]");
  check_dense(x, 1);
  for (const View* t : {&weight, &bias}) {
    check_shape(*t, {x.size[1]}, "[d]");
    check_like(*t, x);
    check_dense(*t);
  }
  check_device(x, {&weight, &bias});
  p.x = x.data;
  p.weight = weight.data;
  p.bias = bias.data;
  p.rows = x.size[0];
  p.d = x.size[1];
  p.x_stride = x.row_stride();
  p.eps = static_cast<float>(eps);
  return p;
}

Tensor run_layer_norm(LayerNormParams p, const View& x) {
  Tensor out = empty({p.rows, p.d}, x.dtype, x);
  p.out = out.data_ptr();
  if (p.rows * p.d > 0) DYVTE_LAUNCH(x, p, layer_norm);
  return out;
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const View vx("rms_norm", "x", x);
  return run_norm(check_norm(vx, nullptr, View("rms_norm", "weight", weight), eps), vx);
}

Tensor add_rms_norm_(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps) {
  constexpr const char* op = "add_rms_norm_";
  const View r(op, "residual", residual), vx(op, "x", x);
  return run_norm(check_add_norm(r, vx, View(op, "weight", weight), eps), vx);
}

void add_rms_norm_into_(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  constexpr const char* op = "add_rms_norm_into_";
  const View r(op, "residual", residual), vx(op, "x", x), to(op, "out", out);
  RmsNormParams p = check_add_norm(r, vx, View(op, "weight", weight), eps);
  check_same(to, vx);
  check_dense(to);
  p.out = to.data;
  if (vx.numel() > 0) DYVTE_LAUNCH(vx, p, rms_norm);
}

Tensor silu_mul(const Tensor& gate_up) {
  const View v("silu_mul", "gate_up", gate_up);
  SiluMulParams p{};
  p.dtype = data_type(v);
  check_shape(v, {-1, -1}, "[N, 2 * m]");
  if (v.size[1] % 2) fail(v.op, ": gate_up must have shape [N, 2 * m], got ", v.shape());
  check_dense(v, 1);
  p.rows = v.size[0];
  p.m = v.size[1] / 2;
  p.stride = v.row_stride();
  p.gate_up = v.data;
  Tensor out = empty({p.rows, p.m}, v.dtype, v);
  p.out = out.data_ptr();
  if (p.rows * p.m > 0) DYVTE_LAUNCH(v, p, silu_mul);
  return out;
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  constexpr const char* op = "layer_norm";
  const View vx(op, "x", x);
  LayerNormParams p = check_layer_norm(vx, View(op, "weight", weight), View(op, "bias", bias), eps);
  return run_layer_norm(p, vx);
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias,
                                          double eps) {
  constexpr const char* op = "add_layer_norm";
  const View vx(op, "x", x), vy(op, "y", y);
  LayerNormParams p = check_layer_norm(vx, View(op, "weight", weight), View(op, "bias", bias), eps);
  check_same(vy, vx);
  check_dense(vy, 1);
  p.y = vy.data;
  p.y_stride = vy.row_stride();
  Tensor sum = empty({p.rows, p.d}, vx.dtype, vx);
  p.sum = sum.data_ptr();
  return {sum, run_layer_norm(p, vx)};
}

void quick_gelu_(const Tensor& x) {
  const View v("quick_gelu_", "x", x);
  check_dense(v);
  const QuickGeluParams p{v.data, v.numel(), data_type(v)};
  if (p.n > 0) DYVTE_LAUNCH(v, p, quick_gelu);
}

namespace {

// Null where there is no bias.
void* check_bias(const char* op, const std::optional<Tensor>& bias, int64_t n, const View& x) {
  if (!bias) return nullptr;
  const View b(op, "bias", *bias);
  check_shape(b, {n}, "[n]");
  check_dense(b);
  check_like(b, x);
  check_device(x, {&b});
  return b.data;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  constexpr const char* op = "linear";
  const View vx(op, "x", x), w(op, "weight", weight);
  if (vx.on_cuda()) fail(op, ": x must be on the CPU; torch.nn.functional.linear serves CUDA");
  LinearParams p{};
  p.dtype = data_type(vx);
  check_shape(vx, {-1, -1}, "[N, k]");
  p.rows = vx.size[0];
  p.k = vx.size[1];
  check_shape(w, {-1, p.k}, "[n, k]");
  p.n = w.size[0];
  for (const View* t : {&vx, &w}) check_dense(*t, 1);
  check_like(w, vx);
  check_device(vx, {&w});
  p.x = vx.data;
  p.x_stride = vx.row_stride();
  p.weight = w.data;
  p.weight_stride = w.row_stride();
  p.bias = check_bias(op, bias, p.n, vx);
  Tensor out = empty({p.rows, p.n}, vx.dtype, vx);
  p.out = out.data_ptr();
  if (p.rows * p.n > 0) launch_cpu(op, DYVTE_CPU_WITH_SCRATCH(p, linear));
  return out;
}

// `wide`: columns of the result that a panel makes.
static PackedLinearParams check_packed(const View& x, const View& weight, int64_t n, int64_t wide) {
  const char* op = x.op;
  if (x.on_cuda()) fail(op, ": x must be on the CPU; torch.nn.functional.linear serves CUDA");
  PackedLinearParams p{};
  p.dtype = data_type(x);
  p.weight_dtype = data_type(weight);
  if (p.dtype == DType::f16) fail(op, ": x must be float32 or bfloat16, got float16");
  if (p.weight_dtype != DType::bf16 && p.weight_dtype != p.dtype)
    fail(op, ": weight must be bfloat16", p.dtype == DType::f32 ? " or float32" : "", ", got ",
         dtype_name(weight.dtype));
  check_shape(x, {-1, -1}, "[N, k]");
  p.rows = x.size[0];
  p.k = x.size[1];
  p.n = n;
  if (n < 0) fail(op, ": n must not be negative, got ", n);
  const int64_t panels = (n + wide - 1) / wide;
  if (p.weight_dtype == DType::f32) {
    check_shape(weight, {panels, p.k, kPanel}, "[panels, k, 64]");
  } else {
    check_shape(weight, {panels, (p.k + 1) / 2, kPanel, 2}, "[panels, ceil(k / 2), 64, 2]");
  }
  check_dense(x, 1);
  check_dense(weight);
  check_device(x, {&weight});
  p.x = x.data;
  p.x_stride = x.row_stride();
  p.weight = weight.data;
  p.gated = wide < kPanel;
  return p;
}

static Tensor run_packed(PackedLinearParams p, const View& x) {
  Tensor out = empty({p.rows, p.n}, x.dtype, x);
  p.out = out.data_ptr();
  if (p.rows * p.n > 0) launch_cpu(x.op, [p] { return packed_linear_cpu(p, torch_parallel_for); });
  return out;
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t n) {
  constexpr const char* op = "packed_linear";
  const View vx(op, "x", x);
  PackedLinearParams p = check_packed(vx, View(op, "weight", weight), n, kPanel);
  p.bias = check_bias(op, bias, n, vx);
  return run_packed(p, vx);
}

Tensor packed_silu_mul(const Tensor& x, const Tensor& weight, int64_t n) {
  constexpr const char* op = "packed_silu_mul";
  const View vx(op, "x", x);
  return run_packed(check_packed(vx, View(op, "weight", weight), n, kPanel / 2), vx);
}

}  // namespace dyvte::bind
