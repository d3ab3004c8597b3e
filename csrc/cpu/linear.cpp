#include "dyvte/linear.h"

#include "linear_panels.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

constexpr int kSums = kLanes == 16 ? 16 : 8;  // vector registers that hold running sums
constexpr int kStreams = 4;                   // weight rows read side by side
constexpr int64_t kAhead = 2048;              // bytes from a weight in use to the one asked of memory
constexpr int64_t kMinWeights = 32768;        // of one thread's share

// Few rows of x times some rows of the weight, each of which is read from memory once. The weight rows read side by
// side are far apart: every stream then runs through memory page after page, which is what hardware prefetchers follow.
template <class T, bool PAIRS>
struct Product {
  using A = Arithmetic<T, PAIRS>;
  using X = typename A::X;
  static constexpr int kUnit = A::kElements > 16 ? A::kElements : 16;  // columns added up at a time

  const LinearParams& p;
  const X* x;                      // [rows, k], row stride x_stride
  int64_t x_stride, first, count;  // rows of x

  // R rows of x from `from`, C rows of the weight: `row` and those `apart` further on.
  template <int R, int C>
  void tile(int64_t from, int64_t row, int64_t apart) const {
    constexpr int kLine = 64 / sizeof(T);  // columns of a cache line
    const X* a = x + from * x_stride;
    const T* w[C];
    for (int c = 0; c < C; ++c) w[c] = static_cast<const T*>(p.weight) + (row + c * apart) * p.weight_stride;
    Vec sum[C * R] = {};
    // J vectors of each row; their products are added up first, so that narrow vectors round no more often than wide
    // ones.
    auto add = [&](int64_t i, auto vectors) {
      constexpr int J = decltype(vectors)::value;
      Vec v[R * J];
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < J; ++j) v[r * J + j] = A::factor(a + r * x_stride + i + j * A::kElements);
      }
      for (int c = 0; c < C; ++c) {
        Vec y[J];
        for (int j = 0; j < J; ++j) y[j] = A::factor(w[c] + i + j * A::kElements);
        for (int r = 0; r < R; ++r) {
          if constexpr (J == 1) {
            sum[c * R + r] = A::multiply_add(sum[c * R + r], v[r], y[0]);
          } else {
            Vec part = v[r * J] * y[0];
            for (int j = 1; j < J; ++j) part += v[r * J + j] * y[j];
            sum[c * R + r] += part;
          }
        }
      }
    };
    int64_t i = 0;
    for (; i + kLine <= p.k; i += kLine) {
      for (int c = 0; c < C; ++c) __builtin_prefetch(reinterpret_cast<const char*>(w[c] + i) + kAhead);
      for (int j = 0; j < kLine; j += kUnit) add(i + j, std::integral_constant<int, kUnit / A::kElements>());
    }
    for (; i + A::kElements <= p.k; i += A::kElements) add(i, std::integral_constant<int, 1>());
    for (int c = 0; c < C; ++c) {
      for (int r = 0; r < R; ++r) {
        float total = hsum(sum[c * R + r]);
        for (int64_t j = i; j < p.k; ++j) total += to_float(a[r * x_stride + j]) * to_float(w[c][j]);
        if (p.bias) total += to_float(static_cast<const T*>(p.bias)[row + c * apart]);
        from_float(total, static_cast<T*>(p.out) + (first + from + r) * p.n + row + c * apart);
      }
    }
  }

  // Rows of x from `from` on: as many as fit the registers at a time, then the rest.
  template <int R, int C>
  void rows(int64_t from, int64_t row, int64_t apart) const {
    for (; from + R <= count; from += R) tile<R, C>(from, row, apart);
    if constexpr (R > 1) rows<R / 2, C>(from, row, apart);
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t apart = (end - begin) / kStreams;
    for (int64_t i = 0; i < apart; ++i) rows<kSums / kStreams, kStreams>(0, begin + i, apart);
    for (int64_t row = begin + kStreams * apart; row < end; ++row) rows<kSums / kStreams, 1>(0, row, 0);
  }
};

// The same for up to kLinearRows rows of x.
template <class T, bool PAIRS>
void few_rows(const LinearParams& p, int64_t first, int64_t end, ParallelFor parallel_for) {
  using X = typename Arithmetic<T, PAIRS>::X;
  const T* from = static_cast<const T*>(p.x) + first * p.x_stride;
  Product<T, PAIRS> product{p, nullptr, p.x_stride, first, end - first};
  if constexpr (std::is_same_v<T, X>) {
    product.x = from;
  } else {
    product.x = p.scratch;
    product.x_stride = p.k;
    for (int64_t r = 0; r < end - first; ++r, from += p.x_stride) {
      for (int64_t i = 0; i < p.k; ++i) p.scratch[r * p.k + i] = to_float(from[i]);
    }
  }
  parallel(parallel_for, p.n, max64(1, kMinWeights / max64(1, p.k)),
           [&](int64_t begin, int64_t stop) { product.run(begin, stop); });
}

// Whether some dozen rows are multiplied in vectors of T as it lies in memory.
template <class T>
constexpr bool kInPanels = kLanes == 16 && std::is_same_v<T, typename Arithmetic<T>::X>;

}  // namespace

Status linear_cpu(const LinearParams& p, ParallelFor parallel_for) {
  by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t first = 0; first < p.rows; first += kLinearRows) {
      const int64_t end = min64(first + kLinearRows, p.rows);
#if defined(__AVX512F__)
      if constexpr (kInPanels<T>) {
        if (p.rows > kLinearFew && p.k > 0) {
          Panels<T>(p, first, end).run(parallel_for);
          continue;
        }
      }
#endif
      // One row alone is as fast as memory anyway, and decoding with it a little slower in pairs (measured).
      if (end - first > 1) {
        few_rows<T, kInPairs<T>>(p, first, end, parallel_for);
      } else {
        few_rows<T, false>(p, first, end, parallel_for);
      }
    }
  });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
