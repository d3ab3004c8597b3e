#include "dyvte/linear.h"
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

Tensor run_norm(const View& x, const View* residual, const View& weight, double eps) {
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
  Tensor out = empty(x.size, x.dim, x.dtype, x);
  p.out = out.data_ptr();
  if (x.numel() > 0) DYVTE_LAUNCH(x, p, rms_norm);
  return out;
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return run_norm(View("rms_norm", "x", x), nullptr, View("rms_norm", "weight", weight), eps);
}

Tensor add_rms_norm_(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps) {
  constexpr const char* op = "add_rms_norm_";
  const View r(op, "residual", residual), vx(op, "x", x);
  bool same = r.dim == vx.dim;
  for (int64_t i = 0; same && i < r.dim; ++i) same = r.size[i] == vx.size[i];
  if (!same) fail(op, ": residual must have the shape of x, ", vx.shape(), ", got ", r.shape());
  check_like(r, vx);
  check_device(vx, {&r});
  if (r.dim > 0) check_dense(r, r.dim - 1);
  return run_norm(vx, &r, View(op, "weight", weight), eps);
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
  if (bias) {
    const View b(op, "bias", *bias);
    check_shape(b, {p.n}, "[n]");
    check_dense(b);
    check_like(b, vx);
    check_device(vx, {&b});
    p.bias = b.data;
  }
  Tensor out = empty({p.rows, p.n}, vx.dtype, vx);
  p.out = out.data_ptr();
  if (p.rows * p.n > 0) launch_cpu(op, DYVTE_CPU_WITH_SCRATCH(p, linear));
  return out;
}

}  // namespace dyvte::bind
