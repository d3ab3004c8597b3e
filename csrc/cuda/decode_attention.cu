// Flash-decoding: every (sequence, K/V head, group of query heads, split of the cached rows) is one block with its own
// online softmax; the last of these blocks, or a second launch, combines the splits. The number of splits follows from
// the cache's capacity, never from the lengths on the device, so that a graph can capture it. A decoding step's new
// rows are in no page yet: each block that reads one has it in registers, and one of them writes it.
#include <type_traits>

#include "common.cuh"
#include "dyvte/decode_attention.h"
#include "ptx.cuh"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPerLane = 8;    // channels of a head one lane holds
constexpr int kMinSplit = 32;  // rows
constexpr int kMaxSplits = 64;
constexpr float kLog2e = 1.4426950408889634f;

// Whether head sizes and addresses allow 16-byte accesses.
bool wide(const DecodeAttentionParams& p) {
  const NewRows& fresh = p.fresh;
  const bool sizes = p.pool.dim % kPerLane == 0 && fresh.rot_dim / 2 % kPerLane == 0;
  const bool strides = p.q_stride % kPerLane == 0 && fresh.k_stride % kPerLane == 0 && fresh.v_stride % kPerLane == 0;
  return sizes && strides && aligned(p.q) && aligned(p.pool.k) && aligned(p.pool.v) && aligned(fresh.k) &&
         aligned(fresh.v) && aligned(fresh.cos_sin);
}

// Query heads of one block: all that share a K/V head, as far as there are registers for them.
int heads_per_block(const DecodeAttentionParams& p) {
  const int64_t group = p.heads_q / p.pool.heads;
  return group == 1 ? 1 : group == 2 ? 2 : group <= 4 || !wide(p) ? 4 : 8;
}

int64_t head_groups(const DecodeAttentionParams& p) { return ceil_div(p.heads_q / p.pool.heads, heads_per_block(p)); }

// Blocks of G heads that a multiprocessor has registers for; left to itself, ptxas spills some to fit more.
constexpr int resident(int g) { return g == 1 ? 4 : g == 2 ? 3 : 2; }

// As many as are at work at the same time: with one more, all would wait for what the last ones do alone.
int64_t split_count(const DecodeAttentionParams& p) {
  const int64_t blocks = p.batch * p.pool.heads * head_groups(p);
  const int64_t wanted = resident(heads_per_block(p)) * multiprocessors() / blocks;
  const int64_t most = ceil_div(p.max_len, kMinSplit);
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits;
}

// Partial results [batch, heads_q, splits, dim] and (largest score in log2 units, weight) [batch, heads_q, splits].
struct Parts {
  float* out;
  float2* stats;
};

__host__ __device__ Parts split_scratch(const DecodeAttentionParams& p, int splits) {
  const int64_t n = p.batch * p.heads_q * splits;
  return {p.scratch + 2 * n, reinterpret_cast<float2*>(p.scratch)};
}

__device__ __forceinline__ int64_t cache_row(const int32_t* table, int row, const DecodeAttentionParams& p, int shift) {
  if (shift < 0) return pool_row(table, row, static_cast<unsigned>(p.pool.page));
  return (static_cast<int64_t>(table[row >> shift]) << shift) + (row & ((1 << shift) - 1));
}

// A lane's channels as they are in memory: two of 16 bits would take two registers as numbers.
template <class T>
struct Channels {
  uint4 raw[kPerLane * sizeof(T) / 16];
};

template <class T>
__device__ __forceinline__ Pack<T, kPerLane> numbers(const Channels<T>& of) {
  Pack<T, kPerLane> pack;
  memcpy(&pack, of.raw, sizeof(pack));
  return pack;
}

template <class T>
__device__ __forceinline__ Channels<T> packed(const Pack<T, kPerLane>& pack) {
  Channels<T> to;
  memcpy(to.raw, &pack, sizeof(pack));
  return to;
}

// Channels first.. of a head at x; zeros behind its end.
template <class T, bool WIDE>
__device__ __forceinline__ Channels<T> load_channels(const T* x, int first, int dim) {
  if (WIDE) {
    if (first < dim) return packed(load_pack<T, kPerLane>(x + first));
    return {};
  }
  Pack<T, kPerLane> pack = {};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (first + i < dim) pack.at[i] = x[first + i];
  }
  return packed(pack);
}

template <class T, bool WIDE>
__device__ __forceinline__ void store_channels(T* to, const Channels<T>& channels, int first, int dim) {
  const Pack<T, kPerLane> pack = numbers(channels);
  if (WIDE) {
    if (first < dim) store_pack(to + first, pack);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (first + i < dim) to[first + i] = pack.at[i];
  }
}

// The same as load_channels, of a head whose first 2 half channels are rotated in pairs, rounded as rope_append leaves
// them. cos: half numbers, then the sines.
template <class T, bool WIDE>
__device__ __forceinline__ Channels<T> load_rotated(const T* x, const float* cos, int half, int first, int dim) {
  Pack<T, kPerLane> pack = numbers(load_channels<T, WIDE>(x, first, dim));
  if (WIDE) {
    if (first >= 2 * half) return packed(pack);
    const bool low = first < half;
    const int angle = low ? first : first - half;
    float other[kPerLane], cs[kPerLane], sn[kPerLane];
    load(x + (low ? first + half : angle), other);
    load(cos + angle, cs);
    load(cos + half + angle, sn);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      from_float(turned(to_float(pack.at[i]), other[i], cs[i], low ? -sn[i] : sn[i]), &pack.at[i]);
    }
    return packed(pack);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int c = first + i, angle = c < half ? c : c - half;
    if (c >= 2 * half) continue;
    const float other = to_float(x[c < half ? c + half : angle]), sn = cos[half + angle];
    from_float(turned(to_float(pack.at[i]), other, cos[angle], c < half ? -sn : sn), &pack.at[i]);
  }
  return packed(pack);
}

// What one group of LANES lanes has seen so far for G query heads.
template <int G>
struct Online {
  float largest[G], weight[G], out[G][kPerLane];
};

template <class T, int LANES, int G, int U>
__device__ __forceinline__ void absorb(Online<G>& state, const float (&q)[G][kPerLane], const Channels<T> (&k)[U],
                                       const Channels<T> (&v)[U], const bool (&valid)[U]) {
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float score[U], top = state.largest[g];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Pack<T, kPerLane> key = numbers(k[u]);
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) dot += q[g][i] * to_float(key.at[i]);
#pragma unroll
      for (int offset = LANES / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(kAllLanes, dot, offset);
      score[u] = valid[u] ? dot : -INFINITY;
      top = fmaxf(top, score[u]);
    }
    const float shift = top == -INFINITY ? 0.0f : top;  // nothing seen yet: avoid -inf - -inf
    const float old = exp2f(state.largest[g] - shift);
    state.largest[g] = top;
    state.weight[g] *= old;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) state.out[g][i] *= old;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const Pack<T, kPerLane> value = numbers(v[u]);
      const float e = exp2f(score[u] - shift);
      state.weight[g] += e;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) state.out[g][i] += e * to_float(value.at[i]);
    }
  }
}

// Writes block result number `split` for head `head`, or the final output when there is one split.
template <class T>
__device__ void write_part(const DecodeAttentionParams& p, int64_t head, int split, int splits, int channel, float out,
                           float largest, float weight) {
  const int64_t dim = p.pool.dim;
  if (splits == 1) {
    from_float(weight > 0.0f ? out / weight : weight, static_cast<T*>(p.out) + head * dim + channel);
    return;
  }
  const Parts parts = split_scratch(p, splits);
  parts.out[(head * splits + split) * dim + channel] = out;
  if (channel == 0) parts.stats[head * splits + split] = make_float2(largest, weight);
}

// One channel of a head, of what all splits found. They may have been written by this kernel: read past the first
// cache, and several at once, for nothing is left to do meanwhile.
template <class T>
__device__ void combine(const DecodeAttentionParams& p, int64_t head, int splits, int channel) {
  constexpr int kAtOnce = 8;
  const Parts parts = split_scratch(p, splits);
  const float2* stats = parts.stats + head * splits;
  const float* out = parts.out + head * splits * p.pool.dim + channel;
  float top = -INFINITY, total = 0.0f, sum = 0.0f;
  for (int begin = 0; begin < splits; begin += kAtOnce) {
    float2 stat[kAtOnce];
    float value[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int s = min(begin + i, splits - 1);  // no branch: all loads are on the way
      stat[i] = __ldcg(stats + s);
      value[i] = __ldcg(out + s * p.pool.dim);
    }
    const float before = top;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) top = fmaxf(top, stat[i].x);
    const float old = before == -INFINITY ? 0.0f : exp2f(before - top);
    total *= old;
    sum *= old;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i >= splits) continue;
      const float scale = stat[i].x == -INFINITY ? 0.0f : exp2f(stat[i].x - top);  // a NaN stays one
      total += scale * stat[i].y;
      sum += scale * value[i];
    }
  }
  from_float(total > 0.0f ? sum / total : total, static_cast<T*>(p.out) + head * p.pool.dim + channel);
}

// `shift`: the page size is 2 to this power; negative: it is none.
template <class T, int LANES, int G, int U, bool WIDE>
__global__ void __launch_bounds__(kThreads, resident(G))
    split_kernel(DecodeAttentionParams p, int groups, int splits, int shift) {
  constexpr int kRows = kWarp / LANES,
                kSeen = kWarps * kRows;  // rows a warp reads at once; partial states of the block
  __shared__ float largest[kSeen][G], weight[kSeen][G], out[kSeen][G][LANES * kPerLane];
  const int split = blockIdx.x % splits, group = blockIdx.x / splits % groups, pair = blockIdx.x / splits / groups;
  const int heads = static_cast<int>(p.pool.heads), seq = pair / heads, kv_head = pair % heads;
  const int shared_by = static_cast<int>(p.heads_q) / heads, dim = static_cast<int>(p.pool.dim);
  const int n_heads = min(G, shared_by - group * G);
  const int64_t head = static_cast<int64_t>(kv_head) * shared_by + group * G;  // first query head of the block
  const int lane = threadIdx.x % kWarp, sub = lane / LANES, first = lane % LANES * kPerLane;
  const int warp = threadIdx.x / kWarp, seen = warp * kRows + sub;
  const int32_t* table = p.block_table + seq * p.table_stride;
  constexpr int kLine = 128 / sizeof(int32_t);
  for (int i = threadIdx.x * kLine; i < p.max_pages; i += kThreads * kLine) prefetch(table + i);

  wait_for_earlier_kernels();
  let_next_begin();
  const int cached = p.kv_lens[seq], len = cached + (p.fresh.k != nullptr), per_split = (len + splits - 1) / splits;
  const int begin = split * per_split, end = min(len, begin + per_split);
  const int64_t row = p.pool.heads * p.pool.dim;
  T* k_pool = static_cast<T*>(p.pool.k) + static_cast<int64_t>(kv_head) * dim;
  T* v_pool = static_cast<T*>(p.pool.v) + static_cast<int64_t>(kv_head) * dim;

  Channels<T> k[U] = {}, v[U] = {};
  const auto fetch = [&](int base) {
#pragma unroll
    for (int u = 0; u < U; ++u) {  // no branch: all loads are on the way; a new row's come from elsewhere
      const int r = max(min(min(base + u * kRows + sub, end - 1), cached - 1), 0);
      const int64_t at = cache_row(table, r, p, shift) * row;
      k[u] = load_channels<T, WIDE>(k_pool + at, first, dim);
      v[u] = load_channels<T, WIDE>(v_pool + at, first, dim);
    }
  };
  int base = begin + warp * kRows * U;
  if (base < end) fetch(base);

  const float* cos = nullptr;
  int half = 0;
  Channels<T> new_k = {}, new_v = {};
  if (p.fresh.k) {
    cos = p.fresh.cos_sin + p.fresh.positions[seq] * p.fresh.rot_dim;
    half = static_cast<int>(p.fresh.rot_dim / 2);
    if (begin <= cached && cached < end) {
      const T* from = static_cast<const T*>(p.fresh.k) + seq * p.fresh.k_stride + static_cast<int64_t>(kv_head) * dim;
      new_k = load_rotated<T, WIDE>(from, cos, half, first, dim);
      from = static_cast<const T*>(p.fresh.v) + seq * p.fresh.v_stride + static_cast<int64_t>(kv_head) * dim;
      new_v = load_channels<T, WIDE>(from, first, dim);
      if (group == 0 && seen == 0) {  // nobody reads it in this kernel
        const int64_t at = cache_row(table, cached, p, shift) * row;
        store_channels<T, WIDE>(k_pool + at, new_k, first, dim);
        store_channels<T, WIDE>(v_pool + at, new_v, first, dim);
      }
    }
  }
  float q[G][kPerLane];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const T* from = static_cast<const T*>(p.q) + seq * p.q_stride + (head + min(g, n_heads - 1)) * dim;
    const Pack<T, kPerLane> pack = numbers(load_rotated<T, WIDE>(from, cos, half, first, dim));
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) q[g][i] = to_float(pack.at[i]) * (p.scale * kLog2e);
  }
  Online<G> state = {};
#pragma unroll
  for (int g = 0; g < G; ++g) state.largest[g] = -INFINITY;

  while (base < end) {
    bool valid[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int r = base + u * kRows + sub;
      valid[u] = r < end;
      if (min(r, end - 1) == cached) {
        k[u] = new_k;
        v[u] = new_v;
      }
    }
    absorb<T, LANES, G, U>(state, q, k, v, valid);
    base += kWarps * kRows * U;
    if (base < end) fetch(base);
  }

#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (first == 0) {
      largest[seen][g] = state.largest[g];
      weight[seen][g] = state.weight[g];
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) out[seen][g][first + i] = state.out[g][i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n_heads * dim; i += kThreads) {
    const int g = i / dim, channel = i % dim;
    float top = -INFINITY, sum = 0.0f, total = 0.0f;
    for (int s = 0; s < kSeen; ++s) top = fmaxf(top, largest[s][g]);
    for (int s = 0; s < kSeen; ++s) {
      const float scale = largest[s][g] == -INFINITY ? 0.0f : exp2f(largest[s][g] - top);
      sum += scale * out[s][g][channel];
      total += scale * weight[s][g];
    }
    write_part<T>(p, seq * p.heads_q + head + g, split, splits, channel, sum, top, total);
  }
  if (splits == 1 || p.arrived == nullptr || !last_to_arrive(p.arrived + blockIdx.x / splits, splits)) return;
  for (int i = threadIdx.x; i < n_heads * dim; i += kThreads) {
    combine<T>(p, seq * p.heads_q + head + i / dim, splits, i % dim);
  }
}

// Block per (sequence, query head).
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(DecodeAttentionParams p, int splits) {
  for (int channel = threadIdx.x; channel < p.pool.dim; channel += kThreads) combine<T>(p, blockIdx.x, splits, channel);
}

template <class T, int LANES, int G, bool WIDE>
void launch_split(const DecodeAttentionParams& p, int splits, void* stream) {
  constexpr int U = (G == 8 ? 4 : 8) / sizeof(T);  // cached rows in flight per lane
  const int64_t groups = head_groups(p), blocks = p.batch * p.pool.heads * groups * splits;
  int shift = 0;
  while (shift < 30 && (int64_t{1} << shift) < p.pool.page) ++shift;
  if ((int64_t{1} << shift) != p.pool.page) shift = -1;
  const auto kernel = split_kernel<T, LANES, G, U, WIDE>;
  if (p.arrived) return launch_early(kernel, blocks, kThreads, 0, stream, p, static_cast<int>(groups), splits, shift);
  launch(kernel, blocks, kThreads, stream, p, static_cast<int>(groups), splits, shift);
}

template <class T, int LANES>
void run_wide(const DecodeAttentionParams& p, int splits, void* stream) {
  switch (heads_per_block(p)) {
    case 1:
      return launch_split<T, LANES, 1, true>(p, splits, stream);
    case 2:
      return launch_split<T, LANES, 2, true>(p, splits, stream);
    case 4:
      return launch_split<T, LANES, 4, true>(p, splits, stream);
    default:
      return launch_split<T, LANES, 8, true>(p, splits, stream);
  }
}

template <class T>
void run_narrow(const DecodeAttentionParams& p, int splits, void* stream) {
  switch (heads_per_block(p)) {
    case 1:
      return launch_split<T, kWarp, 1, false>(p, splits, stream);
    case 2:
      return launch_split<T, kWarp, 2, false>(p, splits, stream);
    default:
      return launch_split<T, kWarp, 4, false>(p, splits, stream);
  }
}

template <class T>
void run(const DecodeAttentionParams& p, void* stream) {
  const int splits = static_cast<int>(split_count(p));
  if (!wide(p)) {
    run_narrow<T>(p, splits, stream);
  } else if (p.pool.dim <= 8 * kPerLane) {
    run_wide<T, 8>(p, splits, stream);
  } else if (p.pool.dim <= 16 * kPerLane) {
    run_wide<T, 16>(p, splits, stream);
  } else {
    run_wide<T, 32>(p, splits, stream);
  }
  if (splits > 1 && p.arrived == nullptr) launch(combine_kernel<T>, p.batch * p.heads_q, kThreads, stream, p, splits);
}

}  // namespace
}  // namespace cuda

int64_t decode_attention_cuda_scratch(const DecodeAttentionParams& p) {
  if (p.batch * p.heads_q == 0) return 0;
  const int64_t splits = cuda::split_count(p);
  return splits > 1 ? p.batch * p.heads_q * splits * (p.pool.dim + 2) : 0;
}

Status decode_attention_cuda(const DecodeAttentionParams& p, void* stream) {
  if (p.batch * p.heads_q * p.pool.dim == 0) return nullptr;
  cuda::by_dtype(p.dtype, [&](auto* type) { cuda::run<std::remove_pointer_t<decltype(type)>>(p, stream); });
  return cuda::launch_status();
}

}  // namespace dyvte
