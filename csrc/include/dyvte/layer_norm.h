// Layer norm, optionally of the rounded sum of two tensors.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

struct LayerNormParams {
  const void* x;       // [rows, d], row stride x_stride
  const void* y;       // null, or the same, row stride y_stride
  const void* weight;  // [d]
  const void* bias;    // [d]
  void* sum;           // x + y [rows, d], where there is y
  void* out;           // [rows, d]
  int64_t rows, d, x_stride, y_stride;
  float eps;
  DType dtype;
};

Status layer_norm_cpu(const LayerNormParams& p, ParallelFor parallel_for);
Status layer_norm_cuda(const LayerNormParams& p, void* stream);

}  // namespace dyvte
