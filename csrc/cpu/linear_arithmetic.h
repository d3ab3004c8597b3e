// How a product multiplies elements of T. Where the processor can, bfloat16 is multiplied in pairs: 32 of them a
// vector.
#pragma once

#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {

#if defined(__AVX512BF16__)
template <class T>
constexpr bool kInPairs = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool kInPairs = false;
#endif

template <class T, bool PAIRS = kInPairs<T>>
struct Arithmetic {
  static constexpr bool kPairs = PAIRS;
  static constexpr int kElements = kPairs ? 2 * kLanes : kLanes;  // of a vector

  using X = std::conditional_t<kPairs, bf16, float>;  // what x is kept as

  template <class U>
  static Vec factor(const U* p) {
    if constexpr (kPairs) {
      Vec pairs;
      std::memcpy(&pairs, p, sizeof(pairs));
      return pairs;
    } else {
      return load(p);
    }
  }

  static Vec multiply_add(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
#endif
    return sum + a * b;
  }
};

}  // namespace DYVTE_ISA
}  // namespace dyvte
