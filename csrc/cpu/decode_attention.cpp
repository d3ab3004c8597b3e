#include "dyvte/decode_attention.h"

#include "cpu_sizes.h"
#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

constexpr int kSlots = 32;                   // query heads of one task
constexpr int kMaxStep = 16;                 // cached rows that all heads look at before the next ones, at most
constexpr int kStepBytes = 16384;            // of K or V, if these are at least four rows
constexpr int kVecs = kLanes == 16 ? 4 : 2;  // vectors of values side by side

// Some rows of one sequence, for `queries` query heads of each of `heads` neighbouring K/V heads. A few cached rows are
// read for all these heads before the next ones, because the same head of the next row is far away in memory; and the
// rows behind them are fetched meanwhile, because no hardware foresees the next page. Slot number h times `queries`
// plus r holds K/V head h, query head r.
template <class T>
struct Chunk {
  const DecodeAttentionParams& p;
  int64_t seq, kv_head, heads, first_query, queries;
  int64_t rows;                         // cached rows of this chunk
  int64_t width;                        // numbers of a head in whole vectors
  int64_t step;                         // of these are looked at, and fetched, before the next ones
  int64_t at[kDecodeChunk + kMaxStep];  // element offset of each row's first head in the pools, then of what is next
  alignas(64) float q[kSlots * kMaxHeadDim];          // [slots, width]
  alignas(64) float parts[kSlots][4 * kDecodeChunk];  // four of each score
  alignas(64) float s[kSlots][kDecodeChunk];          // scores, then exp(score - largest)
  alignas(64) float acc[kSlots * kMaxHeadDim];        // [slots, width]
  float largest[kSlots], total[kSlots];

  // Not an aggregate: the arrays stay uninitialised.
  Chunk(const DecodeAttentionParams& params, int64_t seq_, int64_t kv_head_, int64_t heads_, int64_t first_query_,
        int64_t queries_)
      : p(params), seq(seq_), kv_head(kv_head_), heads(heads_), first_query(first_query_), queries(queries_) {}

  int64_t query_head(int64_t slot) const {
    return (kv_head + slot / queries) * (p.heads_q / p.pool.heads) + first_query + slot % queries;
  }

  // Where the rows of a sequence from `first` on are, n at most; the number of them.
  int64_t find(int64_t sequence, int64_t first, int64_t n, int64_t* to) const {
    n = min64(n, p.kv_lens[sequence] - first);
    const int32_t* page = p.block_table + sequence * p.table_stride + first / p.pool.page;
    const int64_t row = p.pool.heads * p.pool.dim;
    int64_t in_page = first % p.pool.page;
    for (int64_t j = 0; j < n; ++page, in_page = 0) {
      const int64_t start = (*page * p.pool.page + in_page) * row + kv_head * p.pool.dim;
      const int64_t end = min64(n, j + p.pool.page - in_page);
      for (int64_t i = 0; j < end; ++j, ++i) to[j] = start + i * row;
    }
    return n;
  }

  void find_rows(int64_t first) {
    int64_t n = find(seq, first, kDecodeChunk + kMaxStep, at);
    rows = min64(n, kDecodeChunk);
    if (seq + 1 < p.batch) n += find(seq + 1, 0, rows + kMaxStep - n, at + n);
    for (; n < kDecodeChunk + kMaxStep; ++n) at[n] = at[rows - 1];
  }

  void load_queries() {
    for (int64_t slot = 0; slot < heads * queries; ++slot) {
      const T* from = static_cast<const T*>(p.q) + seq * p.q_stride + query_head(slot) * p.pool.dim;
      for (int64_t c = 0; c < p.pool.dim; c += kLanes) {
        store(q + slot * width + c, load_part(from + c, p.pool.dim - c) * p.scale);
        store(acc + slot * width + c, Vec{});
      }
    }
  }

  // Scores of R queries and n cached rows, or up to three more, each still in four parts.
  template <int R>
  [[gnu::noinline]] void score(int64_t slot, int64_t head, int64_t first, int64_t n) {
    const T* k = static_cast<const T*>(p.pool.k) + head * p.pool.dim;
    for (int64_t row = first; row < first + n; row += 4) {
      const T *keys[4], *next[4];
      for (int i = 0; i < 4; ++i) {
        keys[i] = k + at[row + i];
        next[i] = k + at[row + i + step];
      }
      Vec sum[R * 4] = {};
      for (int64_t c = 0; c < p.pool.dim; c += kLanes) {
        Vec x[R];
        for (int r = 0; r < R; ++r) x[r] = load(q + (slot + r) * width + c);
        for (int i = 0; i < 4; ++i) {
          __builtin_prefetch(next[i] + c);
          const Vec y = once(load_part(keys[i] + c, p.pool.dim - c));
          for (int r = 0; r < R; ++r) sum[4 * r + i] += x[r] * y;
        }
      }
      for (int r = 0; r < R; ++r) {
        store_quads(parts[slot + r] + 4 * row, sum[4 * r], sum[4 * r + 1], sum[4 * r + 2], sum[4 * r + 3]);
      }
    }
  }

  // Scores become weights: exp(score - largest).
  void weigh(int64_t slot) {
    int64_t j = 0;
    for (; j < rows; j += kLanes) {
      Vec quads[4];
      for (int i = 0; i < 4; ++i) quads[i] = load(parts[slot] + 4 * j + i * kLanes);
      store(s[slot] + j, lane_numbers() < static_cast<int32_t>(rows - j) ? sum_quads(quads) : splat(-INFINITY));
    }
    largest[slot] = exp_row(s[slot], j, &total[slot]);
  }

  // acc += weight * v over n rows, for R queries and V vectors of values.
  template <int R, int V>
  [[gnu::noinline]] void add_values(int64_t slot, const T* v, int64_t first, int64_t n, int64_t c) {
    Vec sum[R * V];
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < V; ++i) sum[r * V + i] = load(acc + (slot + r) * width + c + i * kLanes);
    }
    for (int64_t j = first; j < first + n; ++j) {
      const T *from = v + at[j] + c, *next = v + at[j + step] + c;
      Vec x[V];
      for (int i = 0; i < V; ++i) {
        __builtin_prefetch(next + i * kLanes);
        x[i] = V > 1 ? load(from + i * kLanes) : load_part(from, p.pool.dim - c);
      }
      for (int r = 0; r < R; ++r) {
        const Vec weight = splat(s[slot + r][j]);
        for (int i = 0; i < V; ++i) sum[r * V + i] += x[i] * weight;
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < V; ++i) store(acc + (slot + r) * width + c + i * kLanes, sum[r * V + i]);
    }
  }

  template <int R>
  void add_values(int64_t slot, int64_t head, int64_t first, int64_t n) {
    const T* v = static_cast<const T*>(p.pool.v) + head * p.pool.dim;
    int64_t c = 0;
    for (; c + kVecs * kLanes <= p.pool.dim; c += kVecs * kLanes) add_values<R, kVecs>(slot, v, first, n, c);
    for (; c < p.pool.dim; c += kLanes) add_values<R, 1>(slot, v, first, n, c);
  }

  // Calls body(number of queries, slot, head, first row, rows) for all slots, up to 4 at a time, and steps of rows.
  template <class Body>
  void by_step(const Body& body) const {
    for (int64_t first = 0; first < rows; first += step) {
      const int64_t n = min64(step, rows - first);
      for (int64_t head = 0; head < heads; ++head) {
        int64_t slot = head * queries, end = slot + queries;
        for (; slot + 4 <= end; slot += 4) body(std::integral_constant<int, 4>(), slot, head, first, n);
        for (; slot + 2 <= end; slot += 2) body(std::integral_constant<int, 2>(), slot, head, first, n);
        for (; slot < end; ++slot) body(std::integral_constant<int, 1>(), slot, head, first, n);
      }
    }
  }

  void run(int64_t first_row) {
    width = (p.pool.dim + kLanes - 1) / kLanes * kLanes;
    step = max64(4, min64(kMaxStep, kStepBytes / (heads * p.pool.dim * static_cast<int64_t>(sizeof(T)))) / 4 * 4);
    find_rows(first_row);
    load_queries();
    by_step([&](auto r, auto... place) { score<decltype(r)::value>(place...); });
    for (int64_t slot = 0; slot < heads * queries; ++slot) weigh(slot);
    by_step([&](auto r, auto... place) { add_values<decltype(r)::value>(place...); });
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
template <class T>
void run_chunk(const DecodeAttentionParams& p, int64_t seq, int64_t kv_head, int64_t heads, int64_t first_query,
               int64_t queries, int64_t part, int64_t chunks) {
  Chunk<T> chunk(p, seq, kv_head, heads, first_query, queries);
  chunk.run(part * kDecodeChunk);
  for (int64_t slot = 0; slot < heads * queries; ++slot) {
    if (chunks == 1) {
      write_head<T>(p, seq, chunk.query_head(slot), chunk.acc + slot * chunk.width, chunk.total[slot]);
      continue;
    }
    float* to = p.scratch + ((seq * p.heads_q + chunk.query_head(slot)) * chunks + part) * (p.pool.dim + 2);
    std::memcpy(to, chunk.acc + slot * chunk.width, p.pool.dim * sizeof(float));
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
  for (int64_t query = 0; query < group; query += kSlots) {
    run_chunk<T>(p, seq, kv_head, heads, query, min64(kSlots, group - query), part, chunks);
  }
}

template <class T>
void decode_attention(const DecodeAttentionParams& p, ParallelFor parallel_for) {
  const int64_t chunks = max64(1, (p.max_len + kDecodeChunk - 1) / kDecodeChunk), group = p.heads_q / p.pool.heads;
  const int64_t heads = max64(1, kSlots / group);  // K/V heads of one task
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
