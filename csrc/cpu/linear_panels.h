// Products of some dozen rows, bound by arithmetic, for AVX-512. Rows of x are brought into panels: a step of a panel
// is two vectors that hold, for each row, a few neighbouring elements. The same elements of a weight row are spread
// over a vector and multiply all of them. So a weight is read once, as it lies in memory, and needs no second copy.
#pragma once

#include "cpu_sizes.h"
#include "dyvte/linear.h"
#include "linear_arithmetic.h"

#if defined(__AVX512F__)

namespace dyvte {
namespace DYVTE_ISA {

constexpr int kGroup = 8;         // weight rows multiplied together: two or three vectors of sums each
constexpr int64_t kColumns = 64;  // weight rows whose block stays in the second-level cache for all panels
constexpr int64_t kBlock = 8192;  // floats of a panel that stay in the first-level cache for these weight rows
constexpr int64_t kWidest = 3 * kLanes;
constexpr int kMaxPanels = kLinearRows / kWidest + 1;

template <class To>
inline To unaligned(const char* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// SPAN floats, again and again.
template <int SPAN>
inline Vec spread(const char* from) {
  if constexpr (SPAN == 1) return _mm512_set1_ps(unaligned<float>(from));
  if constexpr (SPAN == 2) return bit_cast<Vec>(_mm512_set1_epi64(unaligned<int64_t>(from)));
  if constexpr (SPAN == 4) return _mm512_broadcast_f32x4(unaligned<__m128>(from));
}

// Between kLanes / SPAN vectors that each hold a row, and as many that each hold SPAN floats of row 0, of row 1 and so
// on; in both directions.
template <int SPAN>
inline void transpose(Vec* v) {
  for (int d = SPAN; d < kLanes; d *= 2) {
    VecI low, high;
    for (int j = 0; j < kLanes; ++j) {
      low[j] = j & d ? kLanes + j - d : j;
      high[j] = j & d ? kLanes + j : j + d;
    }
    for (int i = 0; i < kLanes / SPAN; ++i) {
      if (i & d / SPAN) continue;
      const Vec a = v[i], b = v[i + d / SPAN];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + d / SPAN] = __builtin_shuffle(a, b, high);
    }
  }
}

// Rows of x that are multiplied together. In a step each has `span` neighbouring units, which fill `vectors` vectors. A
// unit is the place of a float: 4 bytes of a row.
struct Panel {
  int64_t first, rows;
  int span, vectors;

  int64_t width() const { return vectors * kLanes; }
  int64_t capacity() const { return width() / span; }
};

// The first of the panels for so many rows: the smallest that holds them, or a large one.
inline Panel choose_panel(int64_t first, int64_t rows) {
  Panel panel{first, rows, 4, 2};
  if (rows > 8) panel.span = 2;
  if (rows > 16) panel.vectors = 3;
  if (rows > 24) panel.span = 1, panel.vectors = 2;
  if ((rows > 40 && rows <= 48) || rows > 64) panel.vectors = 3;  // else 32 now, and 8 to 32 that remain
  panel.rows = min64(rows, panel.capacity());
  return panel;
}

template <class F>
inline void by_shape(const Panel& panel, const F& f) {
  auto with_vectors = [&](auto span) {
    if (panel.vectors == 2) f(span, std::integral_constant<int, 2>());
    if (panel.vectors == 3) f(span, std::integral_constant<int, 3>());
  };
  if (panel.span == 1) with_vectors(std::integral_constant<int, 1>());
  if (panel.span == 2) with_vectors(std::integral_constant<int, 2>());
  if (panel.span == 4) with_vectors(std::integral_constant<int, 4>());
}

// Up to kLinearRows rows of x, from `first` on, times the weight.
template <class T>
class Panels {
 public:
  Panels(const LinearParams& p, int64_t first, int64_t end) : p_(p), units_((p.k + kUnit - 1) / kUnit) {
    for (; first < end; first += panels_[count_++].rows) panels_[count_] = choose_panel(first, end - first);
    deep_ = kBlock / panels_[0].width() / kLanes * kLanes * panels_[0].span;
  }

  void run(ParallelFor parallel_for) const {
    parallel(parallel_for, (units_ + deep_ - 1) / deep_, 2, [&](int64_t begin, int64_t end) {
      for (int i = 0; i < count_; ++i) {
        by_shape(panels_[i], [&](auto span, auto vectors) {
          pack<span(), vectors()>(i, begin * deep_, min64(units_, end * deep_));
        });
      }
    });
    constexpr int64_t kMinWork = 1 << 20;  // multiplications of one thread's share
    const int64_t grain = kMinWork / max64(1, p_.k * p_.rows);
    parallel(parallel_for, p_.n, max64(kLanes, grain), [&](int64_t begin, int64_t end) { columns(begin, end); });
  }

 private:
  static constexpr int64_t kUnit = 4 / sizeof(T);  // elements

  const LinearParams& p_;
  int64_t units_, deep_;  // all of a row, and those of one block
  Panel panels_[kMaxPanels];
  int count_ = 0;

  const T* weight(int64_t row, int64_t unit) const {
    return static_cast<const T*>(p_.weight) + row * p_.weight_stride + unit * kUnit;
  }

  float* packed(int panel, int64_t unit) const {
    const int64_t padded = (units_ + 3) / 4 * 4;
    float* steps = p_.scratch;
    for (int i = 0; i < panel; ++i) steps += padded / panels_[i].span * panels_[i].width();
    return steps + unit / panels_[panel].span * panels_[panel].width();
  }

  // Units from `begin` to `end` of a panel's rows. Beyond the last unit, and where rows are missing, zeros follow.
  template <int SPAN, int V>
  void pack(int number, int64_t begin, int64_t end) const {
    constexpr int kRows = kLanes / SPAN;  // of a vector
    constexpr int64_t kWidth = V * kLanes;
    const Panel& panel = panels_[number];
    float* to = packed(number, begin);
    for (int64_t unit = begin; unit < end; unit += kLanes, to += kRows * kWidth) {
      const int64_t k = unit * kUnit, n = min64(kLanes * kUnit, p_.k - k);
      for (int v = 0; v < V; ++v) {
        Vec square[kRows] = {};
        const T* from = static_cast<const T*>(p_.x) + (panel.first + v * kRows) * p_.x_stride + k;
        for (int64_t r = 0; r < kRows && v * kRows + r < panel.rows; ++r, from += p_.x_stride) {
          if (n == kLanes * kUnit) {
            std::memcpy(&square[r], from, sizeof(Vec));
          } else {
            std::memcpy(&square[r], from, n * sizeof(T));
          }
        }
        transpose<SPAN>(square);
        for (int64_t i = 0; i < kRows && unit + i * SPAN < end; ++i) {
          store(to + i * kWidth + v * kLanes, square[i]);
        }
      }
    }
  }

  template <int SPAN, int V, int G>
  [[gnu::always_inline]] static void step(Vec* sum, const char* w, int64_t stride, const float* x) {
    Vec rows[V];
    for (int v = 0; v < V; ++v) rows[v] = load(x + v * kLanes);
    for (int g = 0; g < G; ++g) {
      Vec all = spread<SPAN>(w + g * stride);
      asm("" : "+v"(all));  // one load, where the compiler would make one of each multiplication's
      for (int v = 0; v < V; ++v) sum[g * V + v] = Arithmetic<T>::multiply_add(sum[g * V + v], rows[v], all);
    }
  }

  // Adds `bytes` of G weight rows times the steps x to sums [G, V * kLanes], or begins them. `ahead` is needed next.
  template <int SPAN, int V, int G>
  void group(const char* w, int64_t bytes, const float* x, float* sums, bool begin, const char* ahead) const {
    constexpr int64_t kBytes = 4 * SPAN, kWidth = V * kLanes, kLine = 64;
    const int64_t stride = p_.weight_stride * static_cast<int64_t>(sizeof(T));
    Vec sum[V * G] = {};
    int64_t i = 0;
    for (; i + kLine <= bytes; i += kLine) {
      for (int g = 0; g < G; ++g) __builtin_prefetch(ahead + i + g * stride, 0, 2);  // into the second-level cache
      for (int64_t j = i; j < i + kLine; j += kBytes, x += kWidth) step<SPAN, V, G>(sum, w + j, stride, x);
    }
    for (; i + kBytes <= bytes; i += kBytes, x += kWidth) step<SPAN, V, G>(sum, w + i, stride, x);
    if (i < bytes) {
      char rest[G * kBytes] = {};
      for (int g = 0; g < G; ++g) std::memcpy(rest + g * kBytes, w + i + g * stride, bytes - i);
      step<SPAN, V, G>(sum, rest, kBytes, x);
    }
    for (int s = 0; s < V * G; ++s) store(sums + s * kLanes, begin ? sum[s] : load(sums + s * kLanes) + sum[s]);
  }

  // One block of weight rows from `row` to `end` times a panel. `next` follows it in time.
  template <int SPAN, int V, int G>
  void groups(int64_t row, int64_t end, int64_t unit, const float* x, float* sums, const T* next) const {
    const int64_t bytes = min64(4 * deep_, p_.k * static_cast<int64_t>(sizeof(T)) - 4 * unit);
    for (; row + G <= end; row += G, sums += G * V * kLanes) {
      const T* ahead = row + 2 * G <= end ? weight(row + G, unit) : next;
      group<SPAN, V, G>(reinterpret_cast<const char*>(weight(row, unit)), bytes, x, sums, unit == 0,
                        reinterpret_cast<const char*>(ahead));
    }
    if constexpr (G > 1) groups<SPAN, V, G / 2>(row, end, unit, x, sums, next);
  }

  // The sums of a panel into the result.
  template <int SPAN, int V>
  void finish(const Panel& panel, int64_t column, int64_t end, const float* sums) const {
    constexpr int kRows = kLanes / SPAN;
    constexpr int64_t kWidth = V * kLanes;
    for (; column < end; column += kLanes, sums += kLanes * kWidth) {
      const int64_t n = min64(kLanes, end - column);
      T some[kLanes] = {};
      if (p_.bias) std::memcpy(some, static_cast<const T*>(p_.bias) + column, n * sizeof(T));
      const Vec bias = load(some);
      for (int v = 0; v < V; ++v) {
        Vec square[kLanes] = {};
        for (int64_t j = 0; j < n; ++j) square[j] = load(sums + j * kWidth + v * kLanes);
        transpose<1>(square);
        for (int64_t r = 0; r < kRows && v * kRows + r < panel.rows; ++r) {
          Vec total = square[r * SPAN];
          for (int j = 1; j < SPAN; ++j) total += square[r * SPAN + j];
          T* out = static_cast<T*>(p_.out) + (panel.first + v * kRows + r) * p_.n + column;
          if (n == kLanes) {
            store(out, total + bias);
          } else {
            store(some, total + bias);
            std::memcpy(out, some, n * sizeof(T));
          }
        }
      }
    }
  }

  void columns(int64_t begin, int64_t end) const {
    alignas(64) float sums[kMaxPanels][kColumns * kWidest];
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t stop = min64(end, first + kColumns);
      for (int64_t unit = 0; unit < units_; unit += deep_) {
        const T* following = unit + deep_ < units_ ? weight(first, unit + deep_) : weight(stop, 0);
        for (int i = 0; i < count_; ++i) {
          const T* next = i + 1 < count_ ? weight(first, unit) : following;
          by_shape(panels_[i], [&](auto span, auto vectors) {
            groups<span(), vectors(), kGroup>(first, stop, unit, packed(i, unit), sums[i], next);
          });
        }
      }
      for (int i = 0; i < count_; ++i) {
        by_shape(panels_[i],
                 [&](auto span, auto vectors) { finish<span(), vectors()>(panels_[i], first, stop, sums[i]); });
      }
    }
  }
};

}  // namespace DYVTE_ISA
}  // namespace dyvte

#endif
