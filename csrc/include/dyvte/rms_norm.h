// RMS norm with Llama rounding, optionally after adding to the residual stream.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

// Rows are numbered by two indices so that the per-head slices of a fused projection need no copy.
struct RmsNormParams {
  const void* x;       // [outer, inner, d], strides x_outer, x_inner, 1
  void* residual;      // null, or the same shape: residual += x first, and the norm of the sum is returned
  const void* weight;  // [d]
  void* out;           // [outer * inner, d] contiguous
  int64_t outer, inner, d;
  int64_t x_outer, x_inner, res_outer, res_inner;
  float eps;
  DType dtype;
};

Status rms_norm_cpu(const RmsNormParams& p, ParallelFor parallel_for);
Status rms_norm_cuda(const RmsNormParams& p, void* stream);

}  // namespace dyvte
