#include "dyvte/rms_norm.h"

#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

// residual += x, rounded to T.
template <class T>
void add_row(T* residual, const T* x, int64_t d) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(residual + i, load(residual + i) + load(x + i));
  for (; i < d; ++i) from_float(to_float(residual[i]) + to_float(x[i]), residual + i);
}

template <class T>
float sum_of_squares(const T* x, int64_t d) {
  Vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      const Vec v = load(x + i + u * kLanes);
      sum[u] += v * v;
    }
  }
  for (; i + kLanes <= d; i += kLanes) {
    const Vec v = load(x + i);
    sum[0] += v * v;
  }
  float total = hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < d; ++i) total += to_float(x[i]) * to_float(x[i]);
  return total;
}

// out = round(weight * round(x * factor)): Llama rounds the normalised row before the weight.
template <class T>
void scale_row(const T* x, const T* weight, float factor, T* out, int64_t d) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    T rounded[kLanes];
    store(rounded, load(x + i) * factor);
    store(out + i, load(rounded) * load(weight + i));
  }
  for (; i < d; ++i) {
    T rounded;
    from_float(to_float(x[i]) * factor, &rounded);
    from_float(to_float(rounded) * to_float(weight[i]), out + i);
  }
}

}  // namespace

Status rms_norm_cpu(const RmsNormParams& p, ParallelFor parallel_for) {
  if (p.d == 0) return nullptr;
  by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel(parallel_for, p.outer * p.inner, max64(1, 65536 / p.d), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t o = row / p.inner, i = row % p.inner;
        const T* x = static_cast<const T*>(p.x) + o * p.x_outer + i * p.x_inner;
        if (p.residual) {
          T* residual = static_cast<T*>(p.residual) + o * p.res_outer + i * p.res_inner;
          add_row(residual, x, p.d);
          x = residual;
        }
        const float mean = sum_of_squares(x, p.d) / static_cast<float>(p.d);
        scale_row(x, static_cast<const T*>(p.weight), 1.0f / std::sqrt(mean + p.eps),
                  static_cast<T*>(p.out) + row * p.d, p.d);
      }
    });
  });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
