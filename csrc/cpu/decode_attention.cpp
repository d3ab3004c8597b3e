#include "dyvte/decode_attention.h"

#include "cpu_sizes.h"
#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

constexpr int kHeads = 4;  // query heads that share one pass over K and V

// One (sequence, K/V head, chunk of rows, up to four query heads).
template <class T>
struct Chunk {
  const DecodeAttentionParams& p;
  int64_t seq, kv_head, head, heads;  // query heads [head, head + heads)
  int64_t rows;                       // cached rows of this chunk
  int64_t at[kDecodeChunk];           // element offset of each row in the pools
  float q[kHeads][kMaxHeadDim];
  float s[kHeads][kDecodeChunk];  // scores, then exp(score - largest)
  float acc[kHeads][kMaxHeadDim];
  float largest[kHeads], total[kHeads];

  // Not an aggregate: the arrays stay uninitialised.
  Chunk(const DecodeAttentionParams& params, int64_t seq_, int64_t kv_head_, int64_t head_, int64_t heads_)
      : p(params), seq(seq_), kv_head(kv_head_), head(head_), heads(heads_) {}

  void find_rows(int64_t first) {
    const int32_t* table = p.block_table + seq * p.table_stride;
    const int64_t row = p.pool.heads * p.pool.dim;
    rows = min64(kDecodeChunk, p.kv_lens[seq] - first);
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t r = first + j;
      at[j] = (table[r / p.pool.page] * p.pool.page + r % p.pool.page) * row + kv_head * p.pool.dim;
    }
  }

  void load_queries() {
    const T* from = static_cast<const T*>(p.q) + seq * p.q_stride + head * p.pool.dim;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t c = 0; c < p.pool.dim; ++c) q[h][c] = to_float(from[h * p.pool.dim + c]) * p.scale;
    }
  }

  template <int R>
  void score() {
    const T* k = static_cast<const T*>(p.pool.k);
    for (int64_t j = 0; j < rows; ++j) {
      float sums[R];
      dot_rows<R>(q[0], kMaxHeadDim, k + at[j], p.pool.dim, sums);
      for (int r = 0; r < R; ++r) s[r][j] = sums[r];
    }
    for (int r = 0; r < R; ++r) largest[r] = exp_row(s[r], rows, &total[r]);
  }

  // acc = sum over rows of weight * v for columns [c, c + V * kLanes), summed in registers.
  template <int R, int V>
  void weigh_columns(int64_t c) {
    const T* v = static_cast<const T*>(p.pool.v) + c;
    Vec sum[R][V] = {};
    for (int64_t j = 0; j < rows; ++j) {
      for (int i = 0; i < V; ++i) {
        const Vec x = load(v + at[j] + i * kLanes);
        for (int r = 0; r < R; ++r) sum[r][i] += x * s[r][j];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < V; ++i) store(acc[r] + c + i * kLanes, sum[r][i]);
    }
  }

  template <int R>
  void weigh_values() {
    const T* v = static_cast<const T*>(p.pool.v);
    int64_t c = 0;
    for (; c + 2 * kLanes <= p.pool.dim; c += 2 * kLanes) weigh_columns<R, 2>(c);
    for (; c + kLanes <= p.pool.dim; c += kLanes) weigh_columns<R, 1>(c);
    for (; c < p.pool.dim; ++c) {
      for (int r = 0; r < R; ++r) acc[r][c] = 0.0f;
      for (int64_t j = 0; j < rows; ++j) {
        for (int r = 0; r < R; ++r) acc[r][c] += to_float(v[at[j] + c]) * s[r][j];
      }
    }
  }

  template <int R>
  void attend() {
    score<R>();
    weigh_values<R>();
  }

  void run(int64_t first) {
    find_rows(first);
    load_queries();
    if (heads == 4) attend<4>();
    if (heads == 2) attend<2>();
    if (heads == 1) attend<1>();
  }
};

template <class T>
void write_head(const DecodeAttentionParams& p, int64_t seq, int64_t head, const float* acc, float total) {
  T* out = static_cast<T*>(p.out) + (seq * p.heads_q + head) * p.pool.dim;
  const float scale = 1.0f / total;
  for (int64_t c = 0; c < p.pool.dim; ++c) from_float(acc[c] * scale, out + c);
}

// Scratch rows [batch, heads_q, chunks, dim + 2]: unnormalised sum, largest score, total weight.
template <class T>
void combine(const DecodeAttentionParams& p, int64_t seq, int64_t head, int64_t chunks) {
  const int64_t used = (p.kv_lens[seq] + kDecodeChunk - 1) / kDecodeChunk, width = p.pool.dim + 2;
  float* parts = p.scratch + (seq * p.heads_q + head) * chunks * width;
  float best = -INFINITY, total = 0.0f;
  for (int64_t i = 0; i < used; ++i) {
    const float largest = parts[i * width + p.pool.dim];
    best = largest > best ? largest : best;
  }
  float acc[kMaxHeadDim] = {};
  for (int64_t i = 0; i < used; ++i) {
    const float* part = parts + i * width;
    const float weight = std::exp(part[p.pool.dim] - best);
    total += weight * part[p.pool.dim + 1];
    for (int64_t c = 0; c < p.pool.dim; ++c) acc[c] += weight * part[c];
  }
  write_head<T>(p, seq, head, acc, total);
}

template <class T>
void run_task(const DecodeAttentionParams& p, int64_t seq, int64_t kv_head, int64_t part, int64_t chunks) {
  const int64_t group = p.heads_q / p.pool.heads, first = part * kDecodeChunk;
  if (p.kv_lens[seq] == 0 && part == 0) {
    T* out = static_cast<T*>(p.out) + (seq * p.heads_q + kv_head * group) * p.pool.dim;
    std::memset(out, 0, group * p.pool.dim * sizeof(T));
  }
  if (first >= p.kv_lens[seq]) return;
  for (int64_t g = 0; g < group;) {
    const int64_t left = group - g, heads = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    Chunk<T> chunk{p, seq, kv_head, kv_head * group + g, heads};
    chunk.run(first);
    for (int64_t h = 0; h < heads; ++h) {
      if (chunks == 1) {
        write_head<T>(p, seq, chunk.head + h, chunk.acc[h], chunk.total[h]);
        continue;
      }
      float* to = p.scratch + ((seq * p.heads_q + chunk.head + h) * chunks + part) * (p.pool.dim + 2);
      std::memcpy(to, chunk.acc[h], p.pool.dim * sizeof(float));
      to[p.pool.dim] = chunk.largest[h];
      to[p.pool.dim + 1] = chunk.total[h];
    }
    g += heads;
  }
}

template <class T>
void decode_attention(const DecodeAttentionParams& p, ParallelFor parallel_for) {
  const int64_t chunks = max64(1, (p.max_len + kDecodeChunk - 1) / kDecodeChunk), pairs = p.batch * p.pool.heads;
  const int64_t work = p.heads_q / p.pool.heads * p.pool.dim * min64(p.max_len, kDecodeChunk) * 2;
  parallel(parallel_for, pairs * chunks, max64(1, 131072 / max64(1, work)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / chunks;
      run_task<T>(p, pair / p.pool.heads, pair % p.pool.heads, task % chunks, chunks);
    }
  });
  if (chunks == 1) return;
  parallel(parallel_for, p.batch * p.heads_q, max64(1, 65536 / (chunks * p.pool.dim)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (p.kv_lens[i / p.heads_q] > 0) combine<T>(p, i / p.heads_q, i % p.heads_q, chunks);
    }
  });
}

}  // namespace

Status decode_attention_cpu(const DecodeAttentionParams& p, ParallelFor parallel_for) {
  if (p.batch * p.heads_q * p.pool.dim == 0) return nullptr;
  by_dtype(p.dtype, [&](auto* type) { decode_attention<std::remove_pointer_t<decltype(type)>>(p, parallel_for); });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
