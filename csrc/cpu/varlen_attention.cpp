#include "dyvte/varlen_attention.h"

#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

constexpr int kVecs = 3;
constexpr int kSlots = kVecs * kLanes;            // queries of one task, side by side in vectors
constexpr int kKeys = 96;                         // keys between two corrections of the running softmax
constexpr int kValueVecs = kLanes == 16 ? 4 : 2;  // vectors of values side by side

// So many rows of V vectors of sums fit the registers; kKeys is a multiple of all but one of these numbers.
constexpr int tall(int V) { return kLanes < 16 ? 12 / V : V == 4 ? 6 : V == 1 ? 16 : 8; }

// c[i] = sum over l < n of a[i * a_row + l * a_col] * b[l], plus what c holds unless it is new, for i < I. Rows of b
// and c are V vectors.
template <int I, int V>
void tile(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, int64_t n, float* c,
          int64_t c_row, bool fresh) {
  Vec sum[I * V];
  for (int i = 0; i < I * V; ++i) sum[i] = fresh ? Vec{} : load(c + i / V * c_row + i % V * kLanes);
  for (int64_t l = 0; l < n; ++l) {
    Vec y[V];
    for (int j = 0; j < V; ++j) y[j] = load(b + l * b_row + j * kLanes);
    for (int i = 0; i < I; ++i) {
      const Vec x = once(splat(a[i * a_row + l * a_col]));
      for (int j = 0; j < V; ++j) sum[i * V + j] += y[j] * x;
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int j = 0; j < V; ++j) store(c + i * c_row + j * kLanes, sum[i * V + j]);
  }
}

// V vectors of queries that share one K/V head: the heads of a row, then those of the next. In the scores each lane is
// a query, so K needs no transposing, is read one number at a time, and the softmax needs no sum across lanes; in the
// output each lane is a channel, so V needs no transposing either.
template <class T, int V>
struct Block {
  const VarlenAttentionParams& p;
  int64_t seq, first_row, rows, before, kv_head, first_slot, slots;
  int64_t width;                                     // numbers of a head in whole vectors
  alignas(64) float q[kMaxHeadDim * kSlots];         // [width, slots], scaled
  alignas(64) float s[kKeys * kSlots];               // [keys, slots], scores, then exp(score - largest)
  alignas(64) float acc[kSlots * kMaxHeadDim];       // [slots, width]
  alignas(64) float converted[kKeys * kMaxHeadDim];  // [keys, width]
  int32_t seen[V * kLanes];                          // the last key that each query sees
  Vec largest[V], total[V];

  // Not an aggregate: the arrays stay uninitialised.
  Block(const VarlenAttentionParams& params, int64_t seq_, int64_t kv_head_, int64_t first_slot_, int64_t slots_)
      : p(params),
        seq(seq_),
        first_row(p.cu[seq]),
        rows(p.cu[seq + 1] - first_row),
        before(p.before ? p.before[seq] : 0),
        kv_head(kv_head_),
        first_slot(first_slot_),
        slots(slots_),
        width((p.dim + kLanes - 1) / kLanes * kLanes) {}

  // Row of its sequence, and where the query lies in a tensor [rows, heads_q, dim] with that row stride.
  int64_t row(int64_t slot) const { return (first_slot + slot) / (p.heads_q / p.heads_kv); }
  int64_t at(int64_t slot, int64_t stride) const {
    const int64_t group = p.heads_q / p.heads_kv, head = kv_head * group + (first_slot + slot) % group;
    return (first_row + row(slot)) * stride + head * p.dim;
  }

  void start() {
    for (int64_t i = 0; i < V * kLanes; i += kLanes) {
      largest[i / kLanes] = splat(-INFINITY);
      total[i / kLanes] = Vec{};
      const T* from[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t slot = min64(i + lane, slots - 1);  // lanes to spare repeat the last query
        from[lane] = static_cast<const T*>(p.q) + at(slot, p.q_stride);
        seen[i + lane] = static_cast<int32_t>(before + (p.causal ? row(slot) : rows - 1));
      }
      for (int64_t c = 0; c < p.dim; c += kLanes) {
        Vec x[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) x[lane] = load_part(from[lane] + c, p.dim - c) * p.scale;
        transpose(x);
        for (int lane = 0; lane < kLanes; ++lane) store(q + (c + lane) * kSlots + i, x[lane]);
      }
    }
  }

  // Where the keys or values from number `key` on are; of at most n of them `run` follow one another there.
  const T* rows_at(const void* base, int64_t stride, int64_t key, int64_t n, int64_t* run) const {
    int64_t at = first_row + key;
    *run = n;
    if (p.block_table) {
      const int32_t* page = p.block_table + seq * p.table_stride + key / p.page;
      at = *page * p.page + key % p.page;
      int64_t here = p.page - key % p.page;  // neighbours in the table are often neighbours in memory
      for (; here < n && page[1] == page[0] + 1; ++page) here += p.page;
      *run = min64(n, here);
    }
    return static_cast<const T*>(base) + at * stride + kv_head * p.dim;
  }

  // n keys or values from number `key` on, in whole vectors of floats, and the stride of their rows: where they are, if
  // they are that and follow one another; else a copy.
  const float* as_floats(const void* base, int64_t stride, int64_t key, int64_t n, int64_t* row) {
    int64_t run;
    const T* from = rows_at(base, stride, key, n, &run);
    if constexpr (std::is_same_v<T, float>) {
      *row = stride;
      if (run == n && p.dim == width) return from;
    }
    for (int64_t j = 0; j < n; ++j, --run, from += stride) {
      if (run == 0) from = rows_at(base, stride, key + j, n - j, &run);
      for (int64_t c = 0; c < p.dim; c += kLanes) store(converted + j * width + c, load_part(from + c, p.dim - c));
    }
    *row = width;
    return converted;
  }

  // Scores of m keys from number `key` on, as many as fit the registers at a time, then the rest; for the last N
  // vectors of queries, once the others see no more keys.
  template <int N = V, int I = tall(N)>
  void score(const float* k, int64_t stride, int64_t key, int64_t m, float* to) {
    constexpr int kSkipped = (V - N) * kLanes;
    for (; m >= I; m -= I, key += I, k += I * stride, to += I * kSlots) {
      if constexpr (N > 1) {
        if (key > seen[kSkipped + kLanes - 1]) return score<N - 1>(k, stride, key, m, to);
      }
      tile<I, N>(k, stride, 1, q + kSkipped, kSlots, p.dim, to + kSkipped, kSlots, true);
    }
    if constexpr (I > 1) score<N, I / 2>(k, stride, key, m, to);
  }

  void hide_later_keys(int64_t key, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      for (int i = 0; i < V; ++i) {
        float* at = s + j * kSlots + i * kLanes;
        VecI last;
        std::memcpy(&last, seen + i * kLanes, sizeof(last));
        store(at, last >= static_cast<int32_t>(key + j) ? load(at) : splat(-INFINITY));
      }
    }
  }

  void scale_row(int64_t slot, float factor) {
    float* row = acc + slot * width;
    for (int64_t c = 0; c < width; c += kLanes) store(row + c, load(row + c) * factor);
  }

  // The running softmax takes in n more scores of each query; what was summed up before is scaled to the new largest.
  void take_in(int64_t n, bool first) {
    Vec best[V], sum[V];
    for (int i = 0; i < V; ++i) {
      best[i] = largest[i];
      sum[i] = Vec{};
    }
    for (int64_t j = 0; j < n; ++j) {
      for (int i = 0; i < V; ++i) best[i] = larger(load(s + j * kSlots + i * kLanes), best[i]);
    }
    for (int64_t j = 0; j < n; ++j) {
      for (int i = 0; i < V; ++i) {
        const Vec e = exp(load(s + j * kSlots + i * kLanes) - best[i]);
        store(s + j * kSlots + i * kLanes, e);
        sum[i] += e;
      }
    }
    float factor[V * kLanes];
    for (int i = 0; i < V; ++i) {
      const Vec correction = exp(largest[i] - best[i]);
      store(factor + i * kLanes, correction);
      largest[i] = best[i];
      total[i] = total[i] * correction + sum[i];
    }
    for (int64_t slot = 0; slot < slots && !first; ++slot) {
      if (factor[slot] != 1.0f) scale_row(slot, factor[slot]);
    }
  }

  // acc += weight * v over n keys, or begins with them, for N vectors of values. No query looks behind what it sees.
  template <int N, int I = tall(N)>
  void add_vectors(const float* v, int64_t stride, int64_t key, int64_t n, float* to, int64_t slot = 0) {
    for (; slot + I <= slots; slot += I) {
      const int64_t visible = min64(n, seen[slot + I - 1] + 1 - key);
      tile<I, N>(s + slot, 1, kSlots, v, stride, visible, to + slot * width, width, key == 0);
    }
    if constexpr (I > 1) add_vectors<N, I / 2>(v, stride, key, n, to, slot);
  }

  template <int N = kValueVecs>
  void add_values(const float* v, int64_t stride, int64_t key, int64_t n, int64_t c = 0) {
    for (; c + N * kLanes <= width; c += N * kLanes) add_vectors<N>(v + c, stride, key, n, acc + c);
    if constexpr (N > 1) add_values<N - 1>(v, stride, key, n, c);
  }

  void write() {
    float scale[V * kLanes];
    for (int i = 0; i < V; ++i) store(scale + i * kLanes, 1.0f / total[i]);
    for (int64_t slot = 0; slot < slots; ++slot) {
      T* to = static_cast<T*>(p.out) + at(slot, p.heads_q * p.dim);
      const float* from = acc + slot * width;
      int64_t c = 0;
      for (; c + kLanes <= p.dim; c += kLanes) store(to + c, load(from + c) * scale[slot]);
      for (; c < p.dim; ++c) from_float(from[c] * scale[slot], to + c);
    }
  }

  void run() {
    start();
    const int64_t keys = seen[slots - 1] + 1;
    for (int64_t key = 0; key < keys; key += kKeys) {
      const int64_t n = min64(kKeys, keys - key);
      int64_t row;
      const float* k = as_floats(p.k, p.k_stride, key, n, &row);
      score(k, row, key, n, s);
      if (key + n - 1 > seen[0]) hide_later_keys(key, n);
      take_in(n, key == 0);
      const float* v = as_floats(p.v, p.v_stride, key, n, &row);
      add_values(v, row, key, n);
    }
    write();
  }
};

template <class T, int V = kVecs>
void run_block(const VarlenAttentionParams& p, int64_t seq, int64_t kv_head, int64_t first_slot, int64_t slots) {
  if constexpr (V > 1) {
    if (slots <= (V - 1) * kLanes) return run_block<T, V - 1>(p, seq, kv_head, first_slot, slots);
  }
  Block<T, V>(p, seq, kv_head, first_slot, slots).run();
}

template <class T>
void varlen_attention(const VarlenAttentionParams& p, ParallelFor parallel_for) {
  const int64_t group = p.heads_q / p.heads_kv, heads = p.batch * p.heads_kv;
  const int64_t blocks = (p.longest * group + kSlots - 1) / kSlots, tasks = blocks * heads;
  const int64_t work = kSlots * p.dim * p.longest;
  int64_t next = 0;  // tasks differ in length: whichever thread is free takes the next, the last rows (longest) first
  parallel(parallel_for, tasks, max64(1, 524288 / max64(1, work)), [&](int64_t, int64_t) {
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
      const int64_t seq = task % heads / p.heads_kv, first_slot = (blocks - 1 - task / heads) * kSlots;
      const int64_t rows = p.cu[seq + 1] - p.cu[seq], slots = min64(kSlots, rows * group - first_slot);
      if (slots > 0) run_block<T>(p, seq, task % p.heads_kv, first_slot, slots);
    }
  });
}

}  // namespace

Status varlen_attention_cpu(const VarlenAttentionParams& p, ParallelFor parallel_for) {
  by_dtype(p.dtype, [&](auto* type) { varlen_attention<std::remove_pointer_t<decltype(type)>>(p, parallel_for); });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
