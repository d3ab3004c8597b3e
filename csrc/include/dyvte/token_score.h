// How much attention each key receives, averaged over heads and query rows, without an attention map.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

struct TokenScoreParams {
  const void* q;        // [rows_q, heads_q, dim], row stride q_stride
  const void* k;        // [rows_k, heads_kv, dim], row stride k_stride
  const int32_t* cu_q;  // [batch + 1]
  const int32_t* cu_k;
  float* score;    // [rows_k]
  float* scratch;  // token_score_*_scratch() floats
  int64_t q_stride, k_stride, rows_q, rows_k, batch, heads_q, heads_kv, dim;
  float scale;
  DType dtype;
};

int64_t token_score_cpu_scratch(const TokenScoreParams& p);
int64_t token_score_cuda_scratch(const TokenScoreParams& p);
Status token_score_cpu(const TokenScoreParams& p, ParallelFor parallel_for);
Status token_score_cuda(const TokenScoreParams& p, void* stream);

}  // namespace dyvte
