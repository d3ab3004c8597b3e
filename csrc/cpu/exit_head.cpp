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
  float sum;
  dot_rows<1>(x, 0, x, d, &sum);
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

// inner = gelu(W1 pooled). A row of W1 is read once and meets every sequence while it is in the cache.
template <class T>
void first_layer(const ExitHeadParams& p, const Work& w, ParallelFor parallel_for) {
  const int64_t width = p.n_states * p.d;
  const T* w1 = static_cast<const T*>(p.w1);
  parallel(parallel_for, p.inner, max64(1, 131072 / (width * w.count)), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      int64_t a = 0;
      float sums[4];
      auto finish = [&](int rows) {
        for (int r = 0; r < rows; ++r) w.inner[(a + r) * p.inner + j] = gelu(sums[r]);
        a += rows;
      };
      while (a + 4 <= w.count) {
        dot_rows<4>(w.pooled + a * width, width, w1 + j * width, width, sums);
        finish(4);
      }
      while (a + 2 <= w.count) {
        dot_rows<2>(w.pooled + a * width, width, w1 + j * width, width, sums);
        finish(2);
      }
      while (a < w.count) {
        dot_rows<1>(w.pooled + a * width, width, w1 + j * width, width, sums);
        finish(1);
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
  const T* w2 = static_cast<const T*>(p.w2);
  for (int64_t a = 0; a < w.count; ++a) {
    float keep, exit;
    dot_rows<1>(w.inner + a * p.inner, 0, w2, p.inner, &keep);
    dot_rows<1>(w.inner + a * p.inner, 0, w2 + p.inner, p.inner, &exit);
    const float probability = 1.0f / (1.0f + std::exp(keep - exit));
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
