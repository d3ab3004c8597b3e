// Attention of one new query row per sequence over its cached rows.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

struct DecodeAttentionParams {
  const void* q;               // [batch, heads_q, pool.dim], row stride q_stride
  void* out;                   // [batch, heads_q, pool.dim]
  KvPool pool;                 // read only
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
};

int64_t decode_attention_cpu_scratch(const DecodeAttentionParams& p);
int64_t decode_attention_cuda_scratch(const DecodeAttentionParams& p);
Status decode_attention_cpu(const DecodeAttentionParams& p, ParallelFor parallel_for);
Status decode_attention_cuda(const DecodeAttentionParams& p, void* stream);

}  // namespace dyvte
