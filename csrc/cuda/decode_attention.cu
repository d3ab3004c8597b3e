// Flash-decoding: every (sequence, K/V head, group of query heads, split of the cached rows) is one block with its own
// online softmax; the last of these blocks, or a second launch, combines the splits. The number of splits follows from
// the cache's capacity, never from the lengths on the device, so that a graph can capture it.
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
constexpr int kMinBlocks = 2;  // per multiprocessor; left to itself, ptxas spills some registers to fit more
constexpr int kMinSplit = 64;
constexpr int kMaxSplits = 64;
constexpr float kLog2e = 1.4426950408889634f;

// Query heads of one block: all that share a K/V head, up to eight.
int heads_per_block(const DecodeAttentionParams& p) {
  const int64_t group = p.heads_q / p.pool.heads;
  return group == 1 ? 1 : group == 2 ? 2 : group <= 4 ? 4 : 8;
}

int64_t head_groups(const DecodeAttentionParams& p) { return ceil_div(p.heads_q / p.pool.heads, heads_per_block(p)); }

int64_t split_count(const DecodeAttentionParams& p) {
  const int64_t blocks = p.batch * p.pool.heads * head_groups(p);
  const int64_t wanted = ceil_div(2 * multiprocessors(), blocks), most = ceil_div(p.max_len, kMinSplit);
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

template <class T, bool WIDE>
__device__ __forceinline__ Pack<T, kPerLane> load_channels(const T* from, int first, int dim) {
  if (WIDE) {
    if (first < dim) return load_pack<T, kPerLane>(from + first);
    return {};
  }
  Pack<T, kPerLane> pack = {};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (first + i < dim) pack.at[i] = from[first + i];
  }
  return pack;
}

// What one group of LANES lanes has seen so far for G query heads.
template <int G>
struct Online {
  float largest[G], weight[G], out[G][kPerLane];
};

template <class T, int LANES, int G, int U>
__device__ __forceinline__ void absorb(Online<G>& state, const float (&q)[G][kPerLane], const Pack<T, kPerLane> (&k)[U],
                                       const Pack<T, kPerLane> (&v)[U], const bool (&valid)[U]) {
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float score[U], top = state.largest[g];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) dot += q[g][i] * to_float(k[u].at[i]);
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
      const float e = exp2f(score[u] - shift);
      state.weight[g] += e;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) state.out[g][i] += e * to_float(v[u].at[i]);
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
// cache.
template <class T>
__device__ void combine(const DecodeAttentionParams& p, int64_t head, int splits, int channel) {
  const Parts parts = split_scratch(p, splits);
  const float2* stats = parts.stats + head * splits;
  const float* out = parts.out + head * splits * p.pool.dim + channel;
  float top = -INFINITY, total = 0.0f, sum = 0.0f;
  for (int s = 0; s < splits; ++s) top = fmaxf(top, __ldcg(stats + s).x);
  for (int s = 0; s < splits; ++s) {
    const float2 part = __ldcg(stats + s);
    if (part.x == -INFINITY) continue;
    const float scale = exp2f(part.x - top);
    total += scale * part.y;
    sum += scale * __ldcg(out + s * p.pool.dim);
  }
  from_float(total > 0.0f ? sum / total : total, static_cast<T*>(p.out) + head * p.pool.dim + channel);
}

// `shift`: the page size is 2 to this power; negative: it is none.
template <class T, int LANES, int G, int U, bool WIDE>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
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
  const int seen = threadIdx.x / kWarp * kRows + sub;

  wait_for_earlier_kernels();
  let_next_begin();
  const int len = p.kv_lens[seq], per_split = (len + splits * 16 - 1) / (splits * 16) * 16;
  const int begin = split * per_split, end = min(len, begin + per_split);
  const int32_t* table = p.block_table + seq * p.table_stride;
  const int64_t row = p.pool.heads * p.pool.dim;
  const T* k_pool = static_cast<const T*>(p.pool.k) + static_cast<int64_t>(kv_head) * dim;
  const T* v_pool = static_cast<const T*>(p.pool.v) + static_cast<int64_t>(kv_head) * dim;

  float q[G][kPerLane];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const T* from = static_cast<const T*>(p.q) + seq * p.q_stride + (head + min(g, n_heads - 1)) * dim;
    const Pack<T, kPerLane> pack = load_channels<T, WIDE>(from, first, dim);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) q[g][i] = to_float(pack.at[i]) * (p.scale * kLog2e);
  }
  Online<G> state = {};
#pragma unroll
  for (int g = 0; g < G; ++g) state.largest[g] = -INFINITY;

  for (int base = begin + threadIdx.x / kWarp * kRows * U; base < end; base += kWarps * kRows * U) {
    Pack<T, kPerLane> k[U], v[U];
    bool valid[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int r = base + u * kRows + sub;
      valid[u] = r < end;
      const int64_t at = cache_row(table, min(r, end - 1), p, shift) * row;  // no branch: all loads are on the way
      k[u] = load_channels<T, WIDE>(k_pool + at, first, dim);
      v[u] = load_channels<T, WIDE>(v_pool + at, first, dim);
    }
    absorb<T, LANES, G, U>(state, q, k, v, valid);
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
  constexpr int U = G == 8 ? 2 : 4;  // cached rows in flight per lane
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

// Head sizes or addresses that do not allow 16-byte accesses.
template <class T>
void run_narrow(const DecodeAttentionParams& p, int splits, void* stream) {
  switch (heads_per_block(p)) {
    case 1:
      return launch_split<T, kWarp, 1, false>(p, splits, stream);
    case 2:
      return launch_split<T, kWarp, 2, false>(p, splits, stream);
    case 4:
      return launch_split<T, kWarp, 4, false>(p, splits, stream);
    default:
      return launch_split<T, kWarp, 8, false>(p, splits, stream);
  }
}

template <class T>
void run(const DecodeAttentionParams& p, void* stream) {
  const int splits = static_cast<int>(split_count(p));
  const bool wide = p.pool.dim % kPerLane == 0 && p.q_stride % kPerLane == 0 && aligned(p.q) && aligned(p.pool.k) &&
                    aligned(p.pool.v);
  if (!wide) {
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
