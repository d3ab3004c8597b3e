#include "dyvte/rms_norm.h"

#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

// Channels whose squares are summed by themselves, so that the sum of a wide row is not less exact than its parts.
constexpr int64_t kBlock = 256 * kLanes;

float square(float x) { return x * x; }

template <class T>
float sum_of_squares(const T* x, int64_t d) {
  Vec sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= d; i += 2 * kLanes) {
    const Vec a = load(x + i), b = load(x + i + kLanes);
    sum[0] += a * a;
    sum[1] += b * b;
  }
  float total = hsum(sum[0] + sum[1]);
  for (; i < d; ++i) total += square(to_float(x[i]));
  return total;
}

// residual += x, rounded to T; returns the new values' sum of squares.
template <class T>
float add(T* residual, const T* x, int64_t d) {
  Vec sum = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    const Vec v = rounded(load(residual + i) + load(x + i), residual);
    store(residual + i, v);
    sum += v * v;
  }
  float total = hsum(sum);
  for (; i < d; ++i) {
    from_float(to_float(residual[i]) + to_float(x[i]), residual + i);
    total += square(to_float(residual[i]));
  }
  return total;
}

// out = round(weight * round(x * factor)): Llama rounds the normalised row before the weight.
template <class T>
void scale_row(const T* x, const T* weight, float factor, T* out, int64_t d) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(out + i, rounded(load(x + i) * factor, x) * load(weight + i));
  for (; i < d; ++i) {
    T rounded;
    from_float(to_float(x[i]) * factor, &rounded);
    from_float(to_float(rounded) * to_float(weight[i]), out + i);
  }
}

template <class Sum>
float sum_of_blocks(int64_t d, const Sum& sum) {
  float total = 0.0f;
  for (int64_t begin = 0; begin < d; begin += kBlock) total += sum(begin, d - begin < kBlock ? d - begin : kBlock);
  return total;
}

}  // namespace

Status rms_norm_cpu(const RmsNormParams& p, ParallelFor parallel_for) {
  if (p.d == 0) return nullptr;
  by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel(parallel_for, p.outer * p.inner, max64(1, 16384 / p.d), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t o = row / p.inner, i = row % p.inner;
        const T* x = static_cast<const T*>(p.x) + o * p.x_outer + i * p.x_inner;
        T* residual = p.residual ? static_cast<T*>(p.residual) + o * p.res_outer + i * p.res_inner : nullptr;
        const float sum = sum_of_blocks(p.d, [&](int64_t at, int64_t n) {
          return residual ? add(residual + at, x + at, n) : sum_of_squares(x + at, n);
        });
        const float factor = 1.0f / std::sqrt(sum / static_cast<float>(p.d) + p.eps);
        const T* from = residual ? residual : x;
        scale_row(from, static_cast<const T*>(p.weight), factor, static_cast<T*>(p.out) + row * p.d, p.d);
      }
    });
  });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
