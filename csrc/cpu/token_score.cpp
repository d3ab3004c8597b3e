#include "dyvte/token_score.h"

#include "cpu_sizes.h"
#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

// One (sequence, K/V head): sums of attention over the query rows and the query heads of the group.
template <class T>
struct HeadSum {
  const TokenScoreParams& p;
  int64_t q0, nq, k0, nk, kv_head, group;
  double* sum;  // [nk]; many small terms: float32 would lose what torch's pairwise sums keep
  float* s;     // [kScoreRows, nk]
  alignas(64) float q[kScoreRows][kMaxHeadDim];

  HeadSum(const TokenScoreParams& params, int64_t seq, int64_t kv_head_)
      : p(params),
        q0(p.cu_q[seq]),
        nq(p.cu_q[seq + 1] - q0),
        k0(p.cu_k[seq]),
        nk(p.cu_k[seq + 1] - k0),
        kv_head(kv_head_),
        group(p.heads_q / p.heads_kv),
        sum(reinterpret_cast<double*>(p.scratch) + kv_head * p.rows_k + k0),
        s(p.scratch + 2 * p.heads_kv * p.rows_k + (kv_head * p.rows_k + k0) * kScoreRows) {}

  // Query vector number i counts rows first, then the heads of the group.
  int64_t visible(int64_t i) const { return max64(0, nk - nq + i / group + 1); }

  template <int R>
  void add(int64_t first) {
    for (int r = 0; r < R; ++r) {
      const int64_t i = first + r;
      const T* from =
          static_cast<const T*>(p.q) + (q0 + i / group) * p.q_stride + (kv_head * group + i % group) * p.dim;
      for (int64_t c = 0; c < p.dim; ++c) q[r][c] = to_float(from[c]) * p.scale;
    }
    const T* k = static_cast<const T*>(p.k) + k0 * p.k_stride + kv_head * p.dim;
    const int64_t longest = visible(first + R - 1);
    constexpr int C = 8 / R;  // keys at a time
    int64_t j = 0;
    auto add_keys = [&](auto keys) {
      constexpr int kKeys = decltype(keys)::value;
      for (; j + kKeys <= longest; j += kKeys) {
        const float* same[kKeys];
        const T* rows[kKeys];
        float dots[kKeys * R];
        for (int c = 0; c < kKeys; ++c) {
          same[c] = q[0];
          rows[c] = k + (j + c) * p.k_stride;
        }
        dot_block<R, kKeys, true>(same, kMaxHeadDim, rows, p.dim, dots);
        for (int c = 0; c < kKeys; ++c) {
          for (int r = 0; r < R; ++r) s[r * nk + j + c] = dots[c * R + r];
        }
      }
    };
    add_keys(std::integral_constant<int, C>());
    add_keys(std::integral_constant<int, 1>());
    for (int r = 0; r < R; ++r) {
      const int64_t n = visible(first + r);
      float total;
      exp_row(s + r * nk, n, &total);
      const float scale = 1.0f / total;
      for (int64_t j = 0; j < n; ++j) sum[j] += s[r * nk + j] * scale;
    }
  }

  void run() {
    for (int64_t j = 0; j < nk; ++j) sum[j] = 0.0;
    int64_t i = 0;
    for (; i + 4 <= nq * group; i += 4) add<4>(i);
    for (; i < nq * group; ++i) add<1>(i);
  }
};

template <class T>
void token_score(const TokenScoreParams& p, ParallelFor parallel_for) {
  const int64_t work = 1 + p.rows_q * p.rows_k / (p.batch * p.batch) * (p.heads_q / p.heads_kv) * p.dim;
  parallel(parallel_for, p.batch * p.heads_kv, max64(1, 131072 / work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) HeadSum<T>(p, task / p.heads_kv, task % p.heads_kv).run();
  });
  for (int64_t seq = 0; seq < p.batch; ++seq) {
    const int64_t nq = p.cu_q[seq + 1] - p.cu_q[seq];
    const double scale = nq ? 1.0 / static_cast<double>(nq * p.heads_q) : 0.0;
    for (int64_t j = p.cu_k[seq]; j < p.cu_k[seq + 1]; ++j) {
      double sum = 0.0;
      for (int64_t h = 0; h < p.heads_kv; ++h) sum += reinterpret_cast<const double*>(p.scratch)[h * p.rows_k + j];
      p.score[j] = static_cast<float>(sum * scale);
    }
  }
}

}  // namespace

Status token_score_cpu(const TokenScoreParams& p, ParallelFor parallel_for) {
  if (p.batch * p.rows_k == 0) return nullptr;
  by_dtype(p.dtype, [&](auto* type) { token_score<std::remove_pointer_t<decltype(type)>>(p, parallel_for); });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
