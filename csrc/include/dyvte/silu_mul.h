// Gated activation of the MLP: silu(gate) * up.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

struct SiluMulParams {
  const void* gate_up;  // [rows, 2 * m], row stride `stride`
  void* out;            // [rows, m]
  int64_t rows, m, stride;
  DType dtype;
};

Status silu_mul_cpu(const SiluMulParams& p, ParallelFor parallel_for);
Status silu_mul_cuda(const SiluMulParams& p, void* stream);

}  // namespace dyvte
