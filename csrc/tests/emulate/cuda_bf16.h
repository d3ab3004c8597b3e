// bfloat16 with the conversions the kernels use.
#pragma once

#include "simd.h"

struct __nv_bfloat16 {
  dyvte::DYVTE_ISA::bf16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) { return dyvte::DYVTE_ISA::to_float(x.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 to;
  dyvte::DYVTE_ISA::from_float(x, &to.value);
  return to;
}
inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
