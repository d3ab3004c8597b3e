#include "dyvte/varlen_attention.h"

#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

constexpr int kVecs = kLanes == 16 ? 4 : 2;
constexpr int kSlots = kVecs * kLanes;         // queries of one task, side by side in vectors
constexpr int kSums = kLanes == 16 ? 24 : 12;  // vector registers that hold running sums
constexpr int kKeys = 64;                      // keys between two corrections of the running softmax

// c[i][slots] = sum over l < n of a[i * a_row + l * a_col] * b[l][slots], plus what c holds if ADD, for i < I.
template <int I, int V, bool ADD>
void tile(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t n, float* c) {
  Vec sum[I * V] = {};
  for (int i = 0; ADD && i < I; ++i) {
    for (int j = 0; j < V; ++j) sum[i * V + j] = load(c + i * kSlots + j * kLanes);
  }
  for (int64_t l = 0; l < n; ++l) {
    Vec y[V];
    for (int j = 0; j < V; ++j) y[j] = load(b + l * kSlots + j * kLanes);
    for (int i = 0; i < I; ++i) {
      const float x = a[i * a_row + l * a_col];
      for (int j = 0; j < V; ++j) sum[i * V + j] += y[j] * x;
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int j = 0; j < V; ++j) store(c + i * kSlots + j * kLanes, sum[i * V + j]);
  }
}

// The same for i < m: as many as fit the registers at a time, then the rest.
template <int V, bool ADD, int I = kSums / V>
void product(const float* a, int64_t a_row, int64_t a_col, int64_t m, const float* b, int64_t n, float* c) {
  for (; m >= I; m -= I, a += I * a_row, c += I * kSlots) tile<I, V, ADD>(a, a_row, a_col, b, n, c);
  if constexpr (I > 1) product<V, ADD, I / 2>(a, a_row, a_col, m, b, n, c);
}

// V vectors of queries that share one K/V head: the heads of a row, then those of the next. Each lane is a query, so K
// and V are read as they lie, one number at a time, and the softmax needs no sum across lanes.
template <class T, int V>
struct Block {
  const VarlenAttentionParams& p;
  int64_t seq, first_row, rows, before, kv_head, first_slot, slots;
  alignas(64) float q[kMaxHeadDim * kSlots];  // [dim][slots], scaled
  alignas(64) float s[kKeys * kSlots];        // [keys][slots], scores, then exp(score - largest)
  alignas(64) float acc[kMaxHeadDim * kSlots];
  alignas(64) float converted[kKeys * kMaxHeadDim];
  int32_t seen[kSlots];  // the last key that each query sees
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
        slots(slots_) {}

  // Row of its sequence, and where the query lies in a tensor [rows, heads_q, dim] with that row stride.
  int64_t row(int64_t slot) const { return (first_slot + slot) / (p.heads_q / p.heads_kv); }
  int64_t at(int64_t slot, int64_t stride) const {
    const int64_t group = p.heads_q / p.heads_kv, head = kv_head * group + (first_slot + slot) % group;
    return (first_row + row(slot)) * stride + head * p.dim;
  }

  void load_queries() {
    for (int64_t i = 0; i < V * kLanes; ++i) {
      const int64_t slot = min64(i, slots - 1);  // lanes to spare repeat the last query
      const T* from = static_cast<const T*>(p.q) + at(slot, p.q_stride);
      for (int64_t c = 0; c < p.dim; ++c) q[c * kSlots + i] = to_float(from[c]) * p.scale;
      seen[i] = static_cast<int32_t>(before + (p.causal ? row(slot) : rows - 1));
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

  // Calls body(numbers, their row stride, j, run) for keys or values key + j to key + j + run, until there were n.
  template <class Body>
  void as_floats(const void* base, int64_t stride, int64_t key, int64_t n, const Body& body) {
    int64_t run;
    for (int64_t first = 0; first < n; first += run) {
      const T* from = rows_at(base, stride, key + first, n - first, &run);
      if constexpr (std::is_same_v<T, float>) {
        body(from, stride, first, run);
      } else {
        for (int64_t j = 0; j < run; ++j) {
          float* to = converted + (first + j) * p.dim;
          int64_t c = 0;
          for (; c + kLanes <= p.dim; c += kLanes) store(to + c, load(from + j * stride + c));
          for (; c < p.dim; ++c) to[c] = to_float(from[j * stride + c]);
        }
      }
    }
    if constexpr (!std::is_same_v<T, float>) body(converted, p.dim, 0, n);
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

  // The running softmax takes in n more scores of each query; what was summed up before is scaled to the new largest.
  void take_in(int64_t n, bool first) {
    for (int i = 0; i < V; ++i) {
      float* scores = s + i * kLanes;
      Vec best = first ? splat(-INFINITY) : largest[i];
      for (int64_t j = 0; j < n; ++j) {
        const Vec x = load(scores + j * kSlots);
        best = x > best ? x : best;
      }
      Vec sum = {};
      for (int64_t j = 0; j < n; ++j) {
        const Vec e = exp(load(scores + j * kSlots) - best);
        store(scores + j * kSlots, e);
        sum += e;
      }
      if (!first) {
        const Vec correction = exp(largest[i] - best);
        sum += total[i] * correction;
        for (int64_t c = 0; c < p.dim; ++c) {
          float* value = acc + c * kSlots + i * kLanes;
          store(value, load(value) * correction);
        }
      }
      largest[i] = best;
      total[i] = sum;
    }
  }

  void write() {
    float scale[V * kLanes];
    for (int i = 0; i < V; ++i) store(scale + i * kLanes, 1.0f / total[i]);
    for (int64_t slot = 0; slot < slots; ++slot) {
      T* to = static_cast<T*>(p.out) + at(slot, p.heads_q * p.dim);
      for (int64_t c = 0; c < p.dim; ++c) from_float(acc[c * kSlots + slot] * scale[slot], to + c);
    }
  }

  void run() {
    load_queries();
    const int64_t keys = seen[slots - 1] + 1;
    for (int64_t key = 0; key < keys; key += kKeys) {
      const int64_t n = min64(kKeys, keys - key);
      as_floats(p.k, p.k_stride, key, n, [&](const float* k, int64_t stride, int64_t j, int64_t run) {
        product<V, false>(k, stride, 1, run, q, p.dim, s + j * kSlots);
      });
      if (key + n - 1 > seen[0]) hide_later_keys(key, n);
      take_in(n, key == 0);
      as_floats(p.v, p.v_stride, key, n, [&](const float* v, int64_t stride, int64_t j, int64_t run) {
        if (key + j == 0) {
          product<V, false>(v, 1, stride, p.dim, s, run, acc);
        } else {
          product<V, true>(v, 1, stride, p.dim, s + j * kSlots, run, acc);
        }
      });
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
