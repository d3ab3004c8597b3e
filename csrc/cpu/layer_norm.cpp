#include "dyvte/layer_norm.h"

#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

// sum = x + y, rounded to T; returns the total of the row. Without y, and without a sum, that of x.
template <class T>
float add(const T* x, const T* y, T* sum, int64_t d) {
  Vec total = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    Vec v = load(x + i);
    if (y) {
      v = rounded(v + load(y + i), x);
      store(sum + i, v);
    }
    total += v;
  }
  float all = hsum(total);
  for (; i < d; ++i) {
    if (y) from_float(to_float(x[i]) + to_float(y[i]), sum + i);
    all += to_float(y ? sum[i] : x[i]);
  }
  return all;
}

struct Moments {
  float mean, variance;
};

// Channels that are summed by themselves, so that the sums of a wide row are not less exact than their parts.
constexpr int64_t kBlock = 256 * kLanes;

// From a mean that need only be near: what it is off by comes out of the distances to it.
template <class T>
Moments moments(const T* x, float near, int64_t d) {
  float off = 0.0f, all = 0.0f;
  for (int64_t begin = 0; begin < d; begin += kBlock) {
    const int64_t end = d - begin < kBlock ? d : begin + kBlock;
    Vec sum = {}, squares = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec v = load(x + i) - near;
      sum += v;
      squares += v * v;
    }
    off += hsum(sum);
    all += hsum(squares);
    for (; i < end; ++i) {
      const float v = to_float(x[i]) - near;
      off += v;
      all += v * v;
    }
  }
  off /= static_cast<float>(d);
  const float variance = all / static_cast<float>(d) - off * off;
  return {near + off, variance < 0.0f ? 0.0f : variance};  // of equal channels, by rounding; NaN stays
}

template <class T>
void normalise(const T* x, const T* weight, const T* bias, float mean, float factor, T* out, int64_t d) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    store(out + i, (load(x + i) - mean) * factor * load(weight + i) + load(bias + i));
  }
  for (; i < d; ++i) from_float((to_float(x[i]) - mean) * factor * to_float(weight[i]) + to_float(bias[i]), out + i);
}

}  // namespace

Status layer_norm_cpu(const LayerNormParams& p, ParallelFor parallel_for) {
  if (p.d == 0) return nullptr;
  by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel(parallel_for, p.rows, max64(1, 16384 / p.d), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
        const T* y = p.y ? static_cast<const T*>(p.y) + row * p.y_stride : nullptr;
        T *sum = p.y ? static_cast<T*>(p.sum) + row * p.d : nullptr, *out = static_cast<T*>(p.out) + row * p.d;
        const float near = add(x, y, sum, p.d) / static_cast<float>(p.d);
        const T* from = y ? sum : x;
        const Moments m = moments(from, near, p.d);
        const float factor = 1.0f / std::sqrt(m.variance + p.eps);
        normalise(from, static_cast<const T*>(p.weight), static_cast<const T*>(p.bias), m.mean, factor, out, p.d);
      }
    });
  });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
