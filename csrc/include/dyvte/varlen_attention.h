// Attention of packed sequences, as in a prefill, over themselves or over what the cache holds of them, which includes
// them. CPU only; FlashAttention serves CUDA.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

struct VarlenAttentionParams {
  const void* q;               // [rows, heads_q, dim], row stride q_stride
  const void* k;               // [rows, heads_kv, dim], row stride k_stride; or pages of [page, heads_kv, dim]
  const void* v;               // the same, row stride v_stride
  void* out;                   // [rows, heads_q, dim]
  const int32_t* cu;           // [batch + 1], where each sequence's rows begin
  const int32_t* block_table;  // [batch, ...], row stride table_stride, the pages of each sequence; null: k is packed
  const int32_t* before;       // [batch], cached rows before each sequence's queries; null without pages
  int64_t table_stride, page;
  int64_t q_stride, k_stride, v_stride, batch, heads_q, heads_kv, dim;
  int64_t longest;  // rows of the longest sequence
  float scale;
  bool causal;
  DType dtype;
};

Status varlen_attention_cpu(const VarlenAttentionParams& p, ParallelFor parallel_for);

}  // namespace dyvte
