// Exit head: pool token states per sequence, two-layer MLP with erf GELU, softmax over (keep, exit), threshold.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

enum StateBit : int32_t { kMeanVisual = 1, kLastVisual = 2, kMeanText = 4, kLastText = 8 };

struct ExitHeadParams {
  const void* hidden;          // [rows, d], row stride `hidden_stride` elements
  const int32_t* text_ranges;  // [batch, 2] begin, end
  const int32_t* visual_rows;  // packed row numbers, or null
  const int32_t* visual_cu;    // [batch + 1], or null
  const void* w1;              // [inner, n_states * d]
  const void* w2;              // [2, inner]
  const void* b1;              // [inner], added before the GELU, or null
  float* p_exit;               // [batch]
  bool* exit;                  // [batch]
  float* scratch;              // exit_head_*_scratch() floats, 16-byte aligned
  int64_t d, hidden_stride, inner, batch;
  int16_t states, n_states;  // bit mask of StateBit and its population count; beyond 128 bytes nvcc spills registers
  float threshold;
  float rms_eps;  // negative: no normalisation
  DType dtype;
};

int64_t exit_head_cpu_scratch(const ExitHeadParams& p);
int64_t exit_head_cuda_scratch(const ExitHeadParams& p);
Status exit_head_cpu(const ExitHeadParams& p, ParallelFor parallel_for);
Status exit_head_cuda(const ExitHeadParams& p, void* stream);

}  // namespace dyvte
