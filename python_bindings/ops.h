// The functions behind torch.ops.dyvte.*; shapes and meaning are documented in dyvte_engine/kernels/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace dyvte::bind {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> exit_head(const Tensor& hidden, const Tensor& text_ranges,
                                     const std::optional<Tensor>& visual_rows, const std::optional<Tensor>& visual_cu,
                                     const Tensor& w1, const Tensor& w2, int64_t states, double threshold,
                                     std::optional<double> rms_eps, const std::optional<Tensor>& b1);
void kv_compact_(const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table, const Tensor& lens,
                 const Tensor& keep, const Tensor& keep_cu);
void rope_append_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin, const Tensor& positions,
                  const Tensor& cu_seqlens, const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table,
                  const Tensor& lens);
Tensor token_score(const Tensor& q, const Tensor& k, const Tensor& cu_q, const Tensor& cu_k, double scale);
Tensor decode_attention(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table,
                        const Tensor& kv_lens, double scale, const std::optional<Tensor>& arrived);
Tensor rope_append_attention_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                              const Tensor& positions, const Tensor& k_pool, const Tensor& v_pool,
                              const Tensor& block_table, const Tensor& lens, double scale, const Tensor& arrived);
Tensor varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, double scale,
                        bool causal);
Tensor paged_attention(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table,
                       const Tensor& before, const Tensor& cu_seqlens, double scale);
Tensor add_rms_norm_(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps);
void add_rms_norm_into_(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps, const Tensor& out);
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
Tensor silu_mul(const Tensor& gate_up);
Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps);
std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias,
                                          double eps);
void quick_gelu_(const Tensor& x);
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t n);
Tensor packed_silu_mul(const Tensor& x, const Tensor& weight, int64_t n);
Tensor norm_gate_up(const Tensor& hidden, const Tensor& norm, double eps, const Tensor& weight,
                    const std::optional<Tensor>& bias);
Tensor norm_linear(const Tensor& hidden, const Tensor& norm, double eps, const Tensor& weight,
                   const std::optional<Tensor>& bias);
void add_linear_(const Tensor& residual, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
Tensor norm_qkv_append_(const Tensor& hidden, const Tensor& norm, double eps, const Tensor& weight,
                        const std::optional<Tensor>& bias, const Tensor& cos_sin, const Tensor& positions,
                        const Tensor& k_pool, const Tensor& v_pool, const Tensor& block_table, const Tensor& lens);
int64_t tape_begin(const Tensor& arena);
int64_t tape_end(const Tensor& arena);
void tape_run(const Tensor& arena, int64_t tape);
void tape_drop(const Tensor& arena, int64_t tape);

}  // namespace dyvte::bind
