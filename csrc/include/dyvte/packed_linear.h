// Rows times a weight matrix in panels of columns, a second copy of it: any number of rows at the processor's speed, or
// at memory's. CPU only.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

constexpr int64_t kPanel = 64;  // columns, which are rows of the weight [n, k]

struct PackedLinearParams {
  const void* x;       // [rows, k], row stride x_stride, float32 or bfloat16
  const void* weight;  // float32 [panels, k, 64] or bfloat16 [panels, ceil(k / 2), 64, 2], zeros where there is none
  const void* bias;    // [n], or null
  void* out;           // [rows, n]
  int64_t rows, n, k, x_stride;
  DType dtype, weight_dtype;  // of all but the weight, whose bfloat16 serves both
  bool gated;                 // a panel is 32 gates and their 32 factors, of which out has silu(gate) * factor; no bias
};

Status packed_linear_cpu(const PackedLinearParams& p, ParallelFor parallel_for);

}  // namespace dyvte
