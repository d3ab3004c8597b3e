// Rows times a weight matrix as it lies in memory: a few, as in decoding, bound by reading it, or some dozen, as in the
// layers after an exit. CPU only; cuBLAS serves CUDA.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

struct LinearParams {
  const void* x;       // [rows, k], row stride x_stride
  const void* weight;  // [n, k], row stride weight_stride
  const void* bias;    // [n], or null
  void* out;           // [rows, n]
  float* scratch;      // linear_cpu_scratch() floats
  int64_t rows, n, k, x_stride, weight_stride;
  DType dtype;
};

int64_t linear_cpu_scratch(const LinearParams& p);
Status linear_cpu(const LinearParams& p, ParallelFor parallel_for);

}  // namespace dyvte
