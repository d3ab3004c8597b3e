// Rotate q and k in place (rotate-half) and write k, v behind each sequence's cached rows.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

struct RopeAppendParams {
  void* q;        // [rows, heads_q, dim], row stride q_stride
  void* k;        // [rows, pool.heads, dim]
  const void* v;  // [rows, pool.heads, dim]
  int64_t q_stride, k_stride, v_stride;
  const float* cos_sin;       // [max_pos, rot_dim]: cos half | sin half
  const int32_t* positions;   // [rows]
  const int32_t* cu_seqlens;  // [batch + 1]
  KvPool pool;
  const int32_t* block_table;  // [batch, max_pages], row stride table_stride
  const int32_t* lens;         // [batch]
  int64_t rows, batch, heads_q, rot_dim, max_pages, table_stride;
  DType dtype;
};

Status rope_append_cpu(const RopeAppendParams& p, ParallelFor parallel_for);
Status rope_append_cuda(const RopeAppendParams& p, void* stream);

}  // namespace dyvte
