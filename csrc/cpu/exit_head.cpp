#include "dyvte/exit_head.h"

#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

// The rows one pooled state averages: numbers ids[i], or first + i without ids. Last-row states are a mean over one
// row.
struct StateRows {
  const int32_t* ids;
  int64_t first, count;
};

StateRows state_rows(const ExitHeadParams& p, int64_t seq, int32_t bit) {
  if (bit == kMeanVisual || bit == kLastVisual) {
    const int64_t begin = p.visual_cu[seq], count = p.visual_cu[seq + 1] - begin;
    if (bit == kMeanVisual || count == 0) return {p.visual_rows + begin, 0, count};
    return {p.visual_rows + begin + count - 1, 0, 1};
  }
  const int64_t begin = p.text_ranges[2 * seq], count = p.text_ranges[2 * seq + 1] - begin;
  if (bit == kMeanText) return {nullptr, begin, count > 1 ? count - 1 : count};
  return {nullptr, begin + count - 1, min64(count, 1)};
}

bool is_active(const ExitHeadParams& p, int64_t seq) {
  for (int32_t bit = 1; bit <= kLastText; bit *= 2) {
    if ((p.states & bit) && state_rows(p, seq, bit).count == 0) return false;
  }
  return true;
}

// pooled[c] = mean over the rows, for columns [begin, end). Eight rows at a time, summed pairwise.
template <class T>
void mean_rows(const ExitHeadParams& p, const StateRows& rows, float* pooled, int64_t begin, int64_t end) {
  auto at = [&](int64_t i) {
    return static_cast<const T*>(p.hidden) + (rows.ids ? rows.ids[i] : rows.first + i) * p.hidden_stride;
  };
  for (int64_t c = begin; c < end; ++c) pooled[c] = 0.0f;
  int64_t i = 0;
  for (; i + 8 <= rows.count; i += 8) {
    const T* r[8];
    for (int j = 0; j < 8; ++j) r[j] = at(i + j);
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) {
      const Vec low = (load(r[0] + c) + load(r[1] + c)) + (load(r[2] + c) + load(r[3] + c));
      const Vec high = (load(r[4] + c) + load(r[5] + c)) + (load(r[6] + c) + load(r[7] + c));
      store(pooled + c, load(pooled + c) + (low + high));
    }
    for (; c < end; ++c) {
      for (int j = 0; j < 8; ++j) pooled[c] += to_float(r[j][c]);
    }
  }
  for (; i < rows.count; ++i) {
    const T* r = at(i);
    for (int64_t c = begin; c < end; ++c) pooled[c] += to_float(r[c]);
  }
  const float scale = 1.0f / static_cast<float>(rows.count);
  for (int64_t c = begin; c < end; ++c) pooled[c] *= scale;
}

void divide_by_rms(float* x, int64_t d, float eps) {
  const float* self = x;
  float sum;
  dot_block<1, 1, true>(&self, 0, &self, d, &sum);
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(d) + eps);
  for (int64_t i = 0; i < d; ++i) x[i] *= factor;
}

float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }

struct Work {
  float* pooled;    // [active, n_states * d]
  float* inner;     // [active, inner]
  int32_t* active;  // sequence numbers
  int64_t count;
};

template <class T>
void pool_states(const ExitHeadParams& p, const Work& w, ParallelFor parallel_for) {
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (p.d + kBlock - 1) / kBlock, width = p.n_states * p.d;
  parallel(parallel_for, blocks, max64(1, 2048 / (w.count * p.n_states * 16)), [&](int64_t begin, int64_t end) {
    for (int64_t a = 0; a < w.count; ++a) {
      float* pooled = w.pooled + a * width;
      for (int32_t bit = 1; bit <= kLastText; bit *= 2) {
        if (!(p.states & bit)) continue;
        mean_rows<T>(p, state_rows(p, w.active[a], bit), pooled, begin * kBlock, min64(end * kBlock, p.d));
        pooled += p.d;
      }
    }
  });
  if (p.rms_eps < 0) return;
  for (int64_t s = 0; s < w.count * p.n_states; ++s) divide_by_rms(w.pooled + s * p.d, p.d, p.rms_eps);
}

// inner[a][j + c] += W1[j + c] . pooled[a] over `n` columns from `first`, for C rows of W1 and all sequences.
template <int C, class T>
void add_products(const ExitHeadParams& p, const Work& w, int64_t j, int64_t first, int64_t n) {
  const int64_t width = p.n_states * p.d;
  const T* rows[C];
  for (int c = 0; c < C; ++c) rows[c] = static_cast<const T*>(p.w1) + (j + c) * width + first;
  int64_t a = 0;
  auto add = [&](auto sequences) {
    constexpr int R = decltype(sequences)::value;
    for (; a + R <= w.count; a += R) {
      const float* pooled = w.pooled + a * width + first;
      const float* same[C];
      for (int c = 0; c < C; ++c) same[c] = pooled;
      float sums[C * R];
      dot_block<R, C, true>(same, width, rows, n, sums);
      for (int c = 0; c < C; ++c) {
        for (int r = 0; r < R; ++r) w.inner[(a + r) * p.inner + j + c] += sums[c * R + r];
      }
    }
  };
  add(std::integral_constant<int, 4>());
  add(std::integral_constant<int, 1>());
}

// inner = gelu(W1 pooled + b1). W1 passes once; blocks of its rows meet every sequence while they are in the cache.
// Partial sums over 2048 columns keep the rounding error of wide heads down.
template <class T>
void first_layer(const ExitHeadParams& p, const Work& w, ParallelFor parallel_for) {
  constexpr int64_t kColumns = 2048;
  constexpr int kRows = 4;
  const T* b1 = static_cast<const T*>(p.b1);
  const int64_t width = p.n_states * p.d, blocks = (p.inner + kRows - 1) / kRows;
  parallel(parallel_for, blocks, max64(1, 131072 / (width * w.count * kRows)), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kRows; j < min64(end * kRows, p.inner); j += kRows) {
      const int64_t rows = min64(kRows, p.inner - j);
      for (int64_t a = 0; a < w.count; ++a) {
        for (int64_t r = 0; r < rows; ++r) w.inner[a * p.inner + j + r] = b1 ? to_float(b1[j + r]) : 0.0f;
      }
      for (int64_t first = 0; first < width; first += kColumns) {
        const int64_t n = min64(kColumns, width - first);
        if (rows == kRows) {
          add_products<kRows, T>(p, w, j, first, n);
        } else {
          for (int64_t r = 0; r < rows; ++r) add_products<1, T>(p, w, j + r, first, n);
        }
      }
      for (int64_t a = 0; a < w.count; ++a) {
        for (int64_t r = 0; r < rows; ++r) w.inner[a * p.inner + j + r] = gelu(w.inner[a * p.inner + j + r]);
      }
    }
  });
}

template <class T>
void exit_head(const ExitHeadParams& p, ParallelFor parallel_for) {
  const int64_t width = p.n_states * p.d;
  Work w{p.scratch, p.scratch + p.batch * width, nullptr, 0};
  w.active = reinterpret_cast<int32_t*>(w.inner + p.batch * p.inner);
  for (int64_t seq = 0; seq < p.batch; ++seq) {
    p.p_exit[seq] = 0.0f;
    p.exit[seq] = false;
    if (is_active(p, seq)) w.active[w.count++] = static_cast<int32_t>(seq);
  }
  if (w.count == 0) return;
  pool_states<T>(p, w, parallel_for);
  first_layer<T>(p, w, parallel_for);
  const T* w2[] = {static_cast<const T*>(p.w2), static_cast<const T*>(p.w2) + p.inner};
  for (int64_t a = 0; a < w.count; ++a) {
    float logits[2];  // keep, exit
    const float* inner[] = {w.inner + a * p.inner, w.inner + a * p.inner};
    dot_block<1, 2, true>(inner, 0, w2, p.inner, logits);
    const float probability = 1.0f / (1.0f + std::exp(logits[0] - logits[1]));
    p.p_exit[w.active[a]] = probability;
    p.exit[w.active[a]] = probability > p.threshold;
  }
}

}  // namespace

Status exit_head_cpu(const ExitHeadParams& p, ParallelFor parallel_for) {
  by_dtype(p.dtype, [&](auto* type) { exit_head<std::remove_pointer_t<decltype(type)>>(p, parallel_for); });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
