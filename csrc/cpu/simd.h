// One vector of floats, as wide as the instruction set this file is compiled for. Every kernel source is compiled once
// per instruction set into its own namespace DYVTE_ISA; nothing here may be an out-of-line std template, whose copies
// the linker would merge across instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dyvte/common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dyvte {
namespace DYVTE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

inline Vec splat(float x) { return x - Vec{}; }

// --- scalar conversions, round to nearest even -------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, bf16* to) {
  const uint32_t u = bit_cast<uint32_t>(x);
  to->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline void from_float(float x, f16* to) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 2^16 and above
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the bottom
    h = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | h);
}

// --- vectors ---------------------------------------------------------------------------------------------------------

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
// gcc 12 makes three instructions more of __builtin_convertvector than the intrinsics need.
inline Vec load(const bf16* p) {
#if defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#else
  VecH h;
  std::memcpy(&h, p, sizeof(h));
  return bit_cast<Vec>(__builtin_convertvector(h, VecU) << 16);
#endif
}
inline Vec load(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bf16* p, Vec v) {
  const VecU u = bit_cast<VecU>(v);
  const VecU even = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  const VecU bits = v == v ? even : (even & 0u) + 0x7fc0u;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bit_cast<__m512i>(bits)));
#elif defined(__AVX2__)
  __m128i half[2];
  std::memcpy(half, &bits, sizeof(bits));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(half[0], half[1]));
#else
  const VecH h = __builtin_convertvector(bits, VecH);
  std::memcpy(p, &h, sizeof(h));
#endif
}
inline void store(f16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
#endif
}

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));

inline float hsum(Vec4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#if defined(__AVX2__)
inline float hsum(Vec8 v) {
  Vec4 half[2];
  std::memcpy(half, &v, sizeof(v));
  return hsum(half[0] + half[1]);
}
#endif
#if defined(__AVX512F__)
inline float hsum(Vec v) {
  Vec8 half[2];
  std::memcpy(half, &v, sizeof(v));
  return hsum(half[0] + half[1]);
}
#endif

#if defined(__AVX512F__)
inline Vec quads(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  const Vec cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
  return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
}
#endif

// Four sums at once, for less than the price of two.
inline Vec4 hsum4(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  Vec s = quads(a, b, c, d);
  s += _mm512_permute_ps(s, 0xb1);
  s += _mm512_permute_ps(s, 0x4e);
  const __m512i firsts = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s));
#elif defined(__AVX2__)
  const Vec s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  Vec4 half[2];
  std::memcpy(half, &s, sizeof(s));
  return half[0] + half[1];
#else
  return Vec4{hsum(a), hsum(b), hsum(c), hsum(d)};
#endif
}

// a > b ? a : b, also where one of them is NaN, in one instruction.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline float hmax(Vec4 v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
#if defined(__AVX2__)
inline float hmax(Vec8 v) {
  Vec4 half[2];
  std::memcpy(half, &v, sizeof(v));
  return hmax(half[0] > half[1] ? half[0] : half[1]);
}
#endif
#if defined(__AVX512F__)
inline float hmax(Vec v) {
  Vec8 half[2];
  std::memcpy(half, &v, sizeof(v));
  return hmax(half[0] > half[1] ? half[0] : half[1]);
}
#endif

// Four partial sums of each vector, one vector behind the other.
inline void store_quads(float* to, Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  store(to, quads(a, b, c, d));
#elif defined(__AVX2__)
  store(to, _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31));
  store(to + 8, _mm256_permute2f128_ps(c, d, 0x20) + _mm256_permute2f128_ps(c, d, 0x31));
#else
  store(to, a);
  store(to + 4, b);
  store(to + 8, c);
  store(to + 12, d);
#endif
}

// Each number is the sum of four neighbours of those in v.
inline Vec sum_quads(const Vec* v) {
#if defined(__AVX512F__)
  const Vec ab = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
  const Vec cd = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
  const Vec sums = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  return _mm512_permutexvar_ps(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), sums);
#elif defined(__AVX2__)
  const Vec sums = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  return _mm256_permutevar8x32_ps(sums, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
#else
  Vec sum = {};
  for (int i = 0; i < 4; ++i) sum += Vec{v[0][i], v[1][i], v[2][i], v[3][i]};
  return sum;
#endif
}

// v[i][j] becomes v[j][i].
inline void transpose(Vec (&v)[kLanes]) {
#if defined(__AVX512F__)
  Vec t[kLanes];
  for (int i = 0; i < kLanes; i += 4) {  // four by four numbers in each quarter
    const Vec a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
    const Vec c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // then four by four quarters
    const Vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x44), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xee);
    const Vec c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x44), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xee);
    v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[i + 4] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[i + 8] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#else
  float t[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) t[j][i] = v[i][j];
  }
  for (int i = 0; i < kLanes; ++i) v[i] = load(t[i]);
#endif
}

inline VecI lane_numbers() {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// Keeps a vector that is used several times in a register, where the compiler would load it again for each use.
inline Vec once(Vec v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
}

// The first n of a vector, if there are no more; zeros behind them.
template <class T>
inline Vec load_part(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
#if defined(__AVX512F__)
  const uint32_t wanted = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(wanted, p);
  const __m256i part = _mm256_maskz_loadu_epi16(wanted, p);
  return load(reinterpret_cast<const T*>(&part));
#else
  T part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
#endif
}

// v rounded to T, still as floats.
inline Vec rounded(Vec v, const float*) { return v; }
inline Vec rounded(Vec v, const bf16*) {
  const VecU u = bit_cast<VecU>(v);
  const Vec even = bit_cast<Vec>((u + 0x7fffu + (u >> 16 & 1u)) & 0xffff0000u);
  return v == v ? even : v;
}
inline Vec rounded(Vec v, const f16*) {
  f16 half[kLanes];
  store(half, v);
  return load(half);
}

// e^x, within 2 units in the last place; 0 below -87.3, infinity above 88.4 or a little more, NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec low = splat(-87.33654f), high = splat(89.0f);
#if defined(__AVX512F__)
  const Vec clamped = _mm512_min_ps(high, x);
#else
  Vec clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
#endif
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (clamped * 1.44269504f + magic) - magic;
  const Vec r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), p, n);
#else
  const Vec bounded = n == n ? n : Vec{};
  const Vec power = bit_cast<Vec>((__builtin_convertvector(bounded, VecI) + 127) << 23);
  return x < low ? Vec{} : p * power;
#endif
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// --- loops -----------------------------------------------------------------------------------------------------------

template <class F>
inline void parallel(ParallelFor parallel_for, int64_t n, int64_t grain, const F& body) {
  if (n <= grain) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  parallel_for(
      0, n, grain, [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const F*>(ctx))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls f with a null pointer of the element type.
template <class F>
inline void by_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) f(static_cast<float*>(nullptr));
  if (dtype == DType::f16) f(static_cast<f16*>(nullptr));
  if (dtype == DType::bf16) f(static_cast<bf16*>(nullptr));
}

// out[c * R + r] = sum over n of q[c][r * stride + i] * k[c][i]. SAME_Q: all q[c] are one, loaded once for all C.
template <int R, int C, bool SAME_Q, class T>
inline void dot_block(const float* const* q, int64_t stride, const T* const* k, int64_t n, float* out) {
  Vec sum[C * R] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec x[R];
    for (int c = 0; c < C; ++c) {
      for (int r = 0; r < R && !(SAME_Q && c > 0); ++r) x[r] = load(q[c] + r * stride + i);
      const Vec y = load(k[c] + i);
      for (int r = 0; r < R; ++r) sum[c * R + r] += x[r] * y;
    }
  }
  int done = 0;
  for (; done + 4 <= C * R; done += 4) {
    const Vec4 four = hsum4(sum[done], sum[done + 1], sum[done + 2], sum[done + 3]);
    std::memcpy(out + done, &four, sizeof(four));
  }
  for (; done < C * R; ++done) out[done] = hsum(sum[done]);
  for (; i < n; ++i) {
    for (int c = 0; c < C; ++c) {
      for (int r = 0; r < R; ++r) out[c * R + r] += q[c][r * stride + i] * to_float(k[c][i]);
    }
  }
}

// Softmax of s[0..n) in place: returns the largest value, leaves exp(s - largest) and writes their sum.
inline float exp_row(float* s, int64_t n, float* total) {
  float best = -INFINITY;
  int64_t i = 0;
  if (n >= kLanes) {
    Vec top = load(s);
    for (i = kLanes; i + kLanes <= n; i += kLanes) top = larger(load(s + i), top);
    best = hmax(top);
  }
  for (; i < n; ++i) best = s[i] > best ? s[i] : best;
  Vec sum = {};
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const Vec e = exp(load(s + i) - best);
    store(s + i, e);
    sum += e;
  }
  if (i < n) {
    float tail[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) tail[j] = i + j < n ? s[i + j] - best : -INFINITY;
    const Vec e = exp(load(tail));
    store(tail, e);
    for (int64_t j = 0; i + j < n; ++j) s[i + j] = tail[j];
    sum += e;
  }
  *total = hsum(sum);
  return best;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
