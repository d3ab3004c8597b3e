#include "dyvte/packed_linear.h"

#include "linear_arithmetic.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

constexpr int kWide = 4;                     // vectors of columns of a tile
constexpr int kTall = kLanes == 16 ? 6 : 2;  // rows of a tile, at most: its sums stay in registers
constexpr int64_t kDeep = 512;               // steps of a panel that stay in the second-level cache, with their x
constexpr int64_t kChunk = 96;               // rows of x for which they do
constexpr int64_t kStep = 4 * kPanel;  // bytes of a panel that are multiplied at once: one element, or two, a column
constexpr int64_t kAhead = 4096;       // bytes from a weight in use to the one asked of memory
constexpr int64_t kMinWork = 1 << 20;  // multiplications of one thread's share

// Elements X of x times weights W. Every sum is made in one order, whatever rows come with it and whoever computes it.
template <class X, class W>
class Product {
 public:
  explicit Product(const PackedLinearParams& p) : p_(p), steps_((p.k + kPart - 1) / kPart) {}

  void run(ParallelFor parallel_for) const {
    const int64_t wide = p_.gated ? kPanel / 2 : kPanel, panels = (p_.n + wide - 1) / wide,
                  chunks = (p_.rows + kChunk - 1) / kChunk;
    const int64_t work = kPanel * max64(1, p_.k) * min64(p_.rows, kChunk);
    parallel(parallel_for, panels * chunks, (kMinWork + work - 1) / work, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        const int64_t first = begin % chunks * kChunk;
        chunk(begin / chunks, first, min64(p_.rows, first + kChunk));
      }
    });
  }

 private:
  static constexpr int64_t kPart = 4 / sizeof(W);  // elements of a step
  static constexpr bool kPairs = std::is_same_v<X, bf16> && std::is_same_v<W, bf16> && kInPairs<bf16>;
  static constexpr int64_t kShort = kPairs ? kDeep : 256 / kPart;  // steps added up first: long sums would round more

  const PackedLinearParams& p_;
  int64_t steps_;

  // Rows from `first` to `end` times a panel, some steps at a time for all of them.
  void chunk(int64_t panel, int64_t first, int64_t end) const {
    alignas(64) float sums[kChunk * kPanel];
    const int64_t rows = end - first, tiles = (rows + kTall - 1) / kTall;
    int64_t begin = 0;
    do {
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t at = rows * t / tiles;
        tall<kTall>(rows * (t + 1) / tiles - at, panel, first + at, begin, sums + at * kPanel);
      }
      begin += kDeep;
    } while (begin < steps_);
  }

  template <int R>
  void tall(int64_t rows, int64_t panel, int64_t row, int64_t begin, float* sums) const {
    if (rows == R) {
      for (int64_t column = 0; column < kPanel; column += kWide * kLanes) tile<R>(panel, column, row, begin, sums);
      if (p_.gated && begin + kDeep >= steps_) gate<R>(panel, row, sums);
    } else if constexpr (R > 1) {
      tall<R - 1>(rows, panel, row, begin, sums);
    }
  }

  // R rows times kWide vectors of a panel's columns, from step `begin` on; sums [R, kPanel] of those before and behind.
  template <int R>
  void tile(int64_t panel, int64_t column, int64_t row, int64_t begin, float* sums) const {
    const X* x = static_cast<const X*>(p_.x) + row * p_.x_stride + begin * kPart;
    const char* w = static_cast<const char*>(p_.weight) + (panel * steps_ + begin) * kStep + 4 * column;
    int64_t step = begin;
    do {
      const int64_t end = min64(steps_, step + kShort), whole = min64(end, p_.k / kPart);
      Vec sum[R * kWide] = {};
      const bool first = step == 0;
      for (; step < whole; ++step, x += kPart, w += kStep) {
        for (int64_t i = 0; i < 4 * kWide * kLanes; i += 64) __builtin_prefetch(w + kAhead + i);
        add<R, true>(x, w, sum);
      }
      if (step < end) add<R, false>(x, w, sum);
      for (int i = 0; i < R * kWide; ++i) {
        const int64_t at = column + i % kWide * kLanes;
        float* before = sums + i / kWide * kPanel + at;
        const Vec total = first ? sum[i] : load(before) + sum[i];
        if (end < steps_ || p_.gated) {
          store(before, total);
        } else {
          finish(row + i / kWide, panel * kPanel + at, total);
        }
      }
      step = end;
    } while (step < min64(steps_, begin + kDeep));
  }

  // One step. WHOLE: all elements of x are there, else the first.
  template <int R, bool WHOLE>
  [[gnu::always_inline]] void add(const X* x, const char* w, Vec* sum) const {
    for (int part = 0; part < (WHOLE && !kPairs ? kPart : 1); ++part) {
      Vec weights[kWide];
      for (int c = 0; c < kWide; ++c) weights[c] = weight(w + 4 * c * kLanes, part);
      for (int r = 0; r < R; ++r) {
        const Vec a = factor<WHOLE>(x + r * p_.x_stride + part);
        for (int c = 0; c < kWide; ++c) {
          sum[r * kWide + c] = Arithmetic<X, kPairs>::multiply_add(sum[r * kWide + c], a, weights[c]);
        }
      }
    }
  }

  // The part's weights of a vector of columns; in pairs as they are.
  static Vec weight(const char* w, int part) {
    VecU bits;
    std::memcpy(&bits, w, sizeof(bits));
    if constexpr (kPart == 2 && !kPairs) bits = part ? bits & 0xffff0000u : bits << 16;
    return bit_cast<Vec>(bits);
  }

  template <bool WHOLE>
  static Vec factor(const X* x) {
    if constexpr (!kPairs) return splat(to_float(*x));
    uint32_t pair = 0;
    std::memcpy(&pair, x, WHOLE ? 4 : sizeof(X));
    return bit_cast<Vec>(pair - VecU{});
  }

  template <int R>
  void gate(int64_t panel, int64_t row, const float* sums) const {
    constexpr int64_t kHalf = kPanel / 2;
    for (int r = 0; r < R; ++r, sums += kPanel) {
      for (int64_t c = 0; c < kHalf; c += kLanes) {
        finish(row + r, panel * kHalf + c, silu(load(sums + c)) * load(sums + kHalf + c));
      }
    }
  }

  // A vector of the result, or what there is of it.
  void finish(int64_t row, int64_t column, Vec sum) const {
    if (column >= p_.n) return;
    const X* bias = static_cast<const X*>(p_.bias) + (p_.bias ? column : 0);
    X* out = static_cast<X*>(p_.out) + row * p_.n + column;
    if (column + kLanes <= p_.n) return store(out, p_.bias ? sum + load(bias) : sum);
    for (int i = 0; column + i < p_.n; ++i) from_float(p_.bias ? sum[i] + to_float(bias[i]) : sum[i], out + i);
  }
};

}  // namespace

Status packed_linear_cpu(const PackedLinearParams& p, ParallelFor parallel_for) {
  if (p.dtype == DType::bf16) {
    Product<bf16, bf16>(p).run(parallel_for);
  } else if (p.weight_dtype == DType::bf16) {
    Product<float, bf16>(p).run(parallel_for);
  } else {
    Product<float, float>(p).run(parallel_for);
  }
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
