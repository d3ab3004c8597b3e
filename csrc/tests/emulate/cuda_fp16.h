// float16 with the conversions the kernels use; the arithmetic is the CPU kernels' own, checked against torch.
#pragma once

#include "simd.h"

struct __half {
  dyvte::DYVTE_ISA::f16 value;
};
inline float __half2float(__half x) { return dyvte::DYVTE_ISA::to_float(x.value); }
inline __half __float2half_rn(float x) {
  __half to;
  dyvte::DYVTE_ISA::from_float(x, &to.value);
  return to;
}
inline float number(__half x) { return __half2float(x); }
