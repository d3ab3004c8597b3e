// Attention of packed sequences over themselves, as in a prefill. CPU only; FlashAttention serves CUDA.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

struct VarlenAttentionParams {
  const void* q;      // [rows, heads_q, dim], row stride q_stride
  const void* k;      // [rows, heads_kv, dim], row stride k_stride
  const void* v;      // [rows, heads_kv, dim], row stride v_stride
  void* out;          // [rows, heads_q, dim]
  const int32_t* cu;  // [batch + 1], where each sequence's rows begin
  int64_t q_stride, k_stride, v_stride, batch, heads_q, heads_kv, dim;
  int64_t longest;  // rows of the longest sequence
  float scale;
  bool causal;
  DType dtype;
};

Status varlen_attention_cpu(const VarlenAttentionParams& p, ParallelFor parallel_for);

}  // namespace dyvte
