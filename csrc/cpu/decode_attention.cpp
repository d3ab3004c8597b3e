#include "dyvte/decode_attention.h"

#include "cpu_sizes.h"
#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

constexpr int kSlots = 32;  // query heads of one task
constexpr int kSums = 8;    // scores computed at once: R queries times 8 / R cached rows

// Some rows of one sequence, for `heads` neighbouring K/V heads and R of the query heads that share each. A few cached
// rows are read for all these heads before the next ones, because the same head of the next row is far away in memory.
// Slot number h times R plus r holds K/V head h, query head r.
template <class T, int R>
struct Chunk {
  const DecodeAttentionParams& p;
  int64_t seq, kv_head, heads, first_query;
  int64_t rows;              // cached rows of this chunk
  int64_t at[kDecodeChunk];  // element offset of each row's first head in the pools
  alignas(64) float q[kSlots][kMaxHeadDim];
  alignas(64) float s[kSlots][kDecodeChunk];  // scores, then exp(score - largest)
  alignas(64) float acc[kSlots][kMaxHeadDim];
  float largest[kSlots], total[kSlots];

  // Not an aggregate: the arrays stay uninitialised.
  Chunk(const DecodeAttentionParams& params, int64_t seq_, int64_t kv_head_, int64_t heads_, int64_t first_query_)
      : p(params), seq(seq_), kv_head(kv_head_), heads(heads_), first_query(first_query_) {}

  int64_t query_head(int64_t slot) const {
    return (kv_head + slot / R) * (p.heads_q / p.pool.heads) + first_query + slot % R;
  }

  void find_rows(int64_t first) {
    const int32_t* table = p.block_table + seq * p.table_stride;
    const int64_t row = p.pool.heads * p.pool.dim;
    rows = min64(kDecodeChunk, p.kv_lens[seq] - first);
    // No division per row: it would cost as much as the row's arithmetic.
    int64_t page = first / p.pool.page, in_page = first % p.pool.page;
    for (int64_t j = 0; j < rows; ++j) {
      at[j] = (table[page] * p.pool.page + in_page) * row + kv_head * p.pool.dim;
      if (++in_page == p.pool.page) {
        in_page = 0;
        ++page;
      }
    }
  }

  void load_queries() {
    for (int64_t slot = 0; slot < heads * R; ++slot) {
      const T* from = static_cast<const T*>(p.q) + seq * p.q_stride + query_head(slot) * p.pool.dim;
      for (int64_t c = 0; c < p.pool.dim; ++c) q[slot][c] = to_float(from[c]) * p.scale;
    }
  }

  void score() {
    const T* k = static_cast<const T*>(p.pool.k);
    int64_t row = 0;
    auto add_rows = [&](auto count) {
      constexpr int C = decltype(count)::value;
      for (; row + C <= rows; row += C) {
        for (int64_t head = 0; head < heads; ++head) {
          const float* same[C];
          const T* keys[C];
          float dots[C * R];
          for (int c = 0; c < C; ++c) {
            same[c] = q[head * R];
            keys[c] = k + at[row + c] + head * p.pool.dim;
          }
          dot_block<R, C, true>(same, kMaxHeadDim, keys, p.pool.dim, dots);
          for (int c = 0; c < C; ++c) {
            for (int r = 0; r < R; ++r) s[head * R + r][row + c] = dots[c * R + r];
          }
        }
      }
    };
    add_rows(std::integral_constant<int, kSums / R>());
    add_rows(std::integral_constant<int, 1>());
    for (int64_t slot = 0; slot < heads * R; ++slot) largest[slot] = exp_row(s[slot], rows, &total[slot]);
  }

  // acc += weight * v over the J rows from `first`.
  template <int J>
  void add_values(int64_t first) {
    const T* v = static_cast<const T*>(p.pool.v);

    for (int64_t head = 0; head < heads; ++head) {
      const T* from[J];
      for (int j = 0; j < J; ++j) from[j] = v + at[first + j] + head * p.pool.dim;
      float (*sums)[kMaxHeadDim] = acc + head * R;
      const float (*weights)[kDecodeChunk] = s + head * R;
      int64_t c = 0;
      for (; c + kLanes <= p.pool.dim; c += kLanes) {
        Vec sum[R];
        for (int r = 0; r < R; ++r) sum[r] = load(sums[r] + c);
        for (int j = 0; j < J; ++j) {
          const Vec x = load(from[j] + c);
          for (int r = 0; r < R; ++r) sum[r] += x * weights[r][first + j];
        }
        for (int r = 0; r < R; ++r) store(sums[r] + c, sum[r]);
      }
      for (; c < p.pool.dim; ++c) {
        for (int j = 0; j < J; ++j) {
          for (int r = 0; r < R; ++r) sums[r][c] += to_float(from[j][c]) * weights[r][first + j];
        }
      }
    }
  }

  void run(int64_t first) {
    find_rows(first);
    load_queries();
    score();
    for (int64_t slot = 0; slot < heads * R; ++slot) std::memset(acc[slot], 0, p.pool.dim * sizeof(float));
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) add_values<8>(row);
    for (; row < rows; ++row) add_values<1>(row);
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

// One chunk's result: final when the sequence has no other chunk, else a row of the scratch buffer.
template <class T, int R>
void run_chunk(const DecodeAttentionParams& p, int64_t seq, int64_t kv_head, int64_t heads, int64_t first_query,
               int64_t part, int64_t chunks) {
  Chunk<T, R> chunk(p, seq, kv_head, heads, first_query);
  chunk.run(part * kDecodeChunk);
  for (int64_t slot = 0; slot < heads * R; ++slot) {
    if (chunks == 1) {
      write_head<T>(p, seq, chunk.query_head(slot), chunk.acc[slot], chunk.total[slot]);
      continue;
    }
    float* to = p.scratch + ((seq * p.heads_q + chunk.query_head(slot)) * chunks + part) * (p.pool.dim + 2);
    std::memcpy(to, chunk.acc[slot], p.pool.dim * sizeof(float));
    to[p.pool.dim] = chunk.largest[slot];
    to[p.pool.dim + 1] = chunk.total[slot];
  }
}

template <class T>
void run_task(const DecodeAttentionParams& p, int64_t seq, int64_t kv_head, int64_t heads, int64_t part,
              int64_t chunks) {
  const int64_t group = p.heads_q / p.pool.heads;
  if (p.kv_lens[seq] == 0 && part == 0) {
    T* out = static_cast<T*>(p.out) + (seq * p.heads_q + kv_head * group) * p.pool.dim;
    std::memset(static_cast<void*>(out), 0, heads * group * p.pool.dim * sizeof(T));
  }
  if (part * kDecodeChunk >= p.kv_lens[seq]) return;
  int64_t query = 0;
  for (; query + 4 <= group; query += 4) run_chunk<T, 4>(p, seq, kv_head, heads, query, part, chunks);
  for (; query + 2 <= group; query += 2) run_chunk<T, 2>(p, seq, kv_head, heads, query, part, chunks);
  for (; query < group; ++query) run_chunk<T, 1>(p, seq, kv_head, heads, query, part, chunks);
}

template <class T>
void decode_attention(const DecodeAttentionParams& p, ParallelFor parallel_for) {
  const int64_t chunks = max64(1, (p.max_len + kDecodeChunk - 1) / kDecodeChunk), group = p.heads_q / p.pool.heads;
  const int64_t heads = kSlots / (group >= 4 ? 4 : group >= 2 ? 2 : 1);  // K/V heads of one task
  const int64_t blocks = (p.pool.heads + heads - 1) / heads;
  const int64_t work = min64(heads, p.pool.heads) * group * p.pool.dim * min64(p.max_len, kDecodeChunk) * 2;
  parallel(parallel_for, p.batch * blocks * chunks, max64(1, 131072 / max64(1, work)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t seq = task / chunks / blocks, kv_head = task / chunks % blocks * heads;
      run_task<T>(p, seq, kv_head, min64(heads, p.pool.heads - kv_head), task % chunks, chunks);
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
