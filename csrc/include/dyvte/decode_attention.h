// Attention of one new query row per sequence over its cached rows.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

// One row per sequence that is not in the cache yet, and what it and the queries are rotated by (see rope_append.h).
struct NewRows {
  const void* k;  // [batch, pool.heads, pool.dim], row strides k_stride, v_stride; null: there are none
  const void* v;
  int64_t k_stride, v_stride;
  const float* cos_sin;      // [max_pos, rot_dim]
  const int32_t* positions;  // [batch]
  int64_t rot_dim;
};

struct DecodeAttentionParams {
  const void* q;               // [batch, heads_q, pool.dim], row stride q_stride
  void* out;                   // [batch, heads_q, pool.dim]
  KvPool pool;                 // read only without new rows, which are written behind the cached ones
  const int32_t* block_table;  // [batch, max_pages], row stride table_stride
  const int32_t* kv_lens;      // [batch]
  float* scratch;              // decode_attention_*_scratch() floats
  int64_t q_stride, batch, heads_q, max_pages, table_stride;
  int64_t max_len;  // CPU: the largest of kv_lens. CUDA: the capacity max_pages * page, since kv_lens is on the device
  float scale;
  DType dtype;
  // CUDA: [batch * heads_q] zeros, which are zeros again afterwards: then it is one kernel, whose last blocks combine
  // what all of them found. Null: a second kernel combines.
  uint32_t* arrived;
  NewRows fresh;  // CUDA only: q is rotated on the way, and attends to the new row too
};

int64_t decode_attention_cpu_scratch(const DecodeAttentionParams& p);
int64_t decode_attention_cuda_scratch(const DecodeAttentionParams& p);
Status decode_attention_cpu(const DecodeAttentionParams& p, ParallelFor parallel_for);
Status decode_attention_cuda(const DecodeAttentionParams& p, void* stream);

}  // namespace dyvte
