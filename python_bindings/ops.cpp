#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dyvte, m) {
  m.def(
      "exit_head(Tensor hidden, Tensor text_ranges, Tensor? visual_rows, Tensor? visual_cu, Tensor w1, Tensor w2, int "
      "states, float threshold, float? rms_eps, Tensor? b1=None) -> (Tensor, Tensor)");
  m.def(
      "kv_compact_(Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor block_table, Tensor(c!) lens, Tensor keep, Tensor "
      "keep_cu) "
      "-> ()");
  m.def(
      "rope_append_(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor cos_sin, Tensor positions, Tensor cu_seqlens, "
      "Tensor(c!) k_pool, Tensor(d!) v_pool, Tensor block_table, Tensor lens) -> ()");
  m.def("token_score(Tensor q, Tensor k, Tensor cu_q, Tensor cu_k, float scale) -> Tensor");
  m.def(
      "decode_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor block_table, Tensor kv_lens, float scale, "
      "Tensor(a!)? arrived=None) -> Tensor");
  m.def(
      "rope_append_attention_(Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor(a!) k_pool, "
      "Tensor(b!) v_pool, Tensor block_table, Tensor lens, float scale, Tensor(c!) arrived) -> Tensor");
  m.def("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, bool causal=True) -> Tensor");
  m.def(
      "paged_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor block_table, Tensor before, Tensor cu_seqlens, "
      "float scale) -> Tensor");
  m.def("add_rms_norm_(Tensor(a!) residual, Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm_into_(Tensor(a!) residual, Tensor x, Tensor weight, float eps, Tensor(b!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def("add_layer_norm(Tensor x, Tensor y, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)");
  m.def("quick_gelu_(Tensor(a!) x) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor weight, Tensor? bias, int n) -> Tensor");
  m.def("packed_silu_mul(Tensor x, Tensor weight, int n) -> Tensor");
  m.def("norm_gate_up(Tensor hidden, Tensor norm, float eps, Tensor weight, Tensor? bias) -> Tensor");
  m.def("norm_linear(Tensor hidden, Tensor norm, float eps, Tensor weight, Tensor? bias) -> Tensor");
  m.def("add_linear_(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? bias) -> ()");
  m.def(
      "norm_qkv_append_(Tensor hidden, Tensor norm, float eps, Tensor weight, Tensor? bias, Tensor cos_sin, Tensor "
      "positions, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor block_table, Tensor lens) -> Tensor");
  m.def("tape_begin(Tensor(a!) arena) -> int");
  m.def("tape_end(Tensor(a!) arena) -> int");
  m.def("tape_run(Tensor(a!) arena, int tape) -> ()");
  m.def("tape_drop(Tensor(a!) arena, int tape) -> ()");
}

namespace {

// One function serves both keys; without CUDA kernels it raises an error that says so.
void register_ops(torch::stable::detail::StableLibrary& m) {
  using namespace dyvte::bind;
  m.impl("exit_head", TORCH_BOX(&exit_head));
  m.impl("kv_compact_", TORCH_BOX(&kv_compact_));
  m.impl("rope_append_", TORCH_BOX(&rope_append_));
  m.impl("token_score", TORCH_BOX(&token_score));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("rope_append_attention_", TORCH_BOX(&rope_append_attention_));
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  m.impl("add_rms_norm_into_", TORCH_BOX(&add_rms_norm_into_));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("quick_gelu_", TORCH_BOX(&quick_gelu_));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("packed_silu_mul", TORCH_BOX(&packed_silu_mul));
  m.impl("norm_gate_up", TORCH_BOX(&norm_gate_up));
  m.impl("norm_linear", TORCH_BOX(&norm_linear));
  m.impl("add_linear_", TORCH_BOX(&add_linear_));
  m.impl("norm_qkv_append_", TORCH_BOX(&norm_qkv_append_));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dyvte, CPU, m) {
  using namespace dyvte::bind;
  register_ops(m);
  m.impl("tape_begin", TORCH_BOX(&tape_begin));
  m.impl("tape_end", TORCH_BOX(&tape_end));
  m.impl("tape_run", TORCH_BOX(&tape_run));
  m.impl("tape_drop", TORCH_BOX(&tape_drop));
}
STABLE_TORCH_LIBRARY_IMPL(dyvte, CUDA, m) { register_ops(m); }
