// CLIP's activation, in place: x times the sigmoid of 1.702 x.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

struct QuickGeluParams {
  void* x;  // [n]
  int64_t n;
  DType dtype;
};

Status quick_gelu_cpu(const QuickGeluParams& p, ParallelFor parallel_for);
Status quick_gelu_cuda(const QuickGeluParams& p, void* stream);

}  // namespace dyvte
