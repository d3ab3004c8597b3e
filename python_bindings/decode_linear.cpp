#include "dyvte/decode_linear.h"

#include "cache.h"
#include "launch.h"
#include "ops.h"

namespace dyvte::bind {
namespace {

void check_aligned(const View& v) {
  if (reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && (v.dim < 2 || v.size[0] < 2 || v.stride[0] % 8 == 0)) return;
  fail(v.op, ": ", v.name, " must begin at, and have rows at, multiples of 16 bytes");
}

// The arguments that all of them take. `norm` may be null.
DecodeProduct check_product(const View& x, const View* norm, double eps, const View& weight,
                            const std::optional<Tensor>& bias) {
  if (!x.on_cuda()) fail(x.op, ": ", x.name, " must be on CUDA; a CPU has the ops that this one is made of");
  DecodeProduct p{};
  p.dtype = data_type(x);
  if (p.dtype == DType::f32) fail(x.op, ": ", x.name, " must be float16 or bfloat16, got float32");
  check_shape(x, {-1, -1}, "[B, k]");
  p.rows = x.size[0];
  p.k = x.size[1];
  if (p.rows > kDecodeRows) fail(x.op, ": ", x.name, " must have at most ", kDecodeRows, " rows, got ", x.shape());
  if (p.k % 8) fail(x.op, ": ", x.name, " must have a multiple of 8 columns, got ", x.shape());
  check_shape(weight, {-1, p.k}, "[n, k]");
  p.n = weight.size[0];
  for (const View* t : {&x, &weight}) {
    check_dense(*t, 1);
    check_aligned(*t);
  }
  check_like(weight, x);
  check_device(x, {&weight});
  if (norm) {
    check_shape(*norm, {p.k}, "[k]");
    check_dense(*norm);
    check_aligned(*norm);
    check_like(*norm, x);
    check_device(x, {norm});
    p.norm = norm->data;
  }
  if (bias) {
    const View b(x.op, "bias", *bias);
    check_shape(b, {p.n}, "[n]");
    check_dense(b);
    check_like(b, x);
    check_device(x, {&b});
    p.bias = b.data;
  }
  p.x = x.data;
  p.weight = weight.data;
  p.x_stride = x.row_stride();
  p.weight_stride = weight.row_stride();
  p.eps = static_cast<float>(eps);
  return p;
}

// Only reached on CUDA: check_product refuses all else.
Status on_cpu() { return "no CPU kernel"; }

}  // namespace

Tensor norm_gate_up(const Tensor& hidden, const Tensor& norm, double eps, const Tensor& weight,
                    const std::optional<Tensor>& bias) {
  constexpr const char* op = "norm_gate_up";
  const View x(op, "hidden", hidden), n(op, "norm", norm), w(op, "weight", weight);
  NormGateUpParams p{};
  p.product = check_product(x, &n, eps, w, bias);
  if (p.product.n % 2) fail(op, ": weight must have shape [2 m, k], got ", w.shape());
  Tensor out = empty({p.product.rows, p.product.n / 2}, x.dtype, x);
  p.out = out.data_ptr();
  dispatch(x, on_cpu, [&](auto* stream) { return norm_gate_up_cuda(p, stream); });
  return out;
}

Tensor norm_linear(const Tensor& hidden, const Tensor& norm, double eps, const Tensor& weight,
                   const std::optional<Tensor>& bias) {
  constexpr const char* op = "norm_linear";
  const View x(op, "hidden", hidden), n(op, "norm", norm), w(op, "weight", weight);
  NormLinearParams p{};
  p.product = check_product(x, &n, eps, w, bias);
  Tensor out = empty({p.product.rows, p.product.n}, aoti_torch_dtype_float32(), x);
  p.out = static_cast<float*>(out.data_ptr());
  dispatch(x, on_cpu, [&](auto* stream) { return norm_linear_cuda(p, stream); });
  return out;
}

void add_linear_(const Tensor& residual, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  constexpr const char* op = "add_linear_";
  const View r(op, "residual", residual), vx(op, "x", x), w(op, "weight", weight);
  AddLinearParams p{};
  p.product = check_product(vx, nullptr, 0.0, w, bias);
  check_shape(r, {p.product.rows, p.product.n}, "[B, n]");
  check_dense(r, 1);
  check_like(r, vx);
  check_device(vx, {&r});
  p.residual = r.data;
  p.residual_stride = r.row_stride();
  dispatch(vx, on_cpu, [&](auto* stream) { return add_linear_cuda(p, stream); });
}

Tensor norm_qkv_append_(const Tensor& hidden, const Tensor& norm, double eps, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& cos_sin, const Tensor& positions,
                        const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table, const Tensor& lens) {
  constexpr const char* op = "norm_qkv_append_";
  const View x(op, "hidden", hidden), n(op, "norm", norm), w(op, "weight", weight), cs(op, "cos_sin", cos_sin),
      pos(op, "positions", positions), kp(op, "k_pool", k_pool), vp(op, "v_pool", v_pool),
      table(op, "block_table", block_table), len(op, "lens", lens);
  NormQkvAppendParams p{};
  p.product = check_product(x, &n, eps, w, bias);
  p.pool = check_pool(kp, vp);
  check_like(kp, x);
  const int64_t dim = p.pool.dim, rows = p.product.rows;
  if (dim == 0 || dim % 16) fail(op, ": k_pool must have a head size that is a multiple of 16, got ", kp.shape());
  p.heads_q = p.product.n / dim - 2 * p.pool.heads;
  if (p.product.n % dim || p.heads_q < 1) {
    fail(op, ": weight must have ", dim, " rows for each head of q, k and v, got ", w.shape());
  }
  check_shape(cs, {-1, dim}, "[max_pos, D]");
  check_float32(cs);
  check_dense(cs);
  check_index(pos, {rows}, "[B]");
  check_int32(table);
  check_shape(table, {rows, -1}, "[B, M]");
  check_dense(table, 1);
  check_index(len, {rows}, "[B]");
  check_device(x, {&cs, &pos, &kp, &table, &len});
  p.cos_sin = cs.as<float>();
  p.positions = pos.as<int32_t>();
  p.block_table = table.as<int32_t>();
  p.table_stride = table.row_stride();
  p.max_pages = table.size[1];
  p.lens = len.as<int32_t>();
  Tensor q = empty({rows, p.heads_q, dim}, x.dtype, x);
  p.q = q.data_ptr();
  dispatch(x, on_cpu, [&](auto* stream) { return norm_qkv_append_cuda(p, stream); });
  return q;
}

}  // namespace dyvte::bind
