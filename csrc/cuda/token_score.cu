// Of one query row for each sequence, two launches that read K once: `row_kernel` keeps the scores, [heads, keys], and
// finds the softmax denominators, `row_mean_kernel` averages the probabilities over the heads. Of more rows, three, and
// no map of queries x keys anywhere: `stats_kernel` finds the denominators of every query row, `column_kernel` computes
// the scores again and adds the probabilities of each key over the query rows of one head, `mean_kernel` averages over
// the heads. All sums run in a fixed order.
#include <type_traits>

#include "common.cuh"
#include "dyvte/token_score.h"
#include "ptx.cuh"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMinBlocks = 4;             // per multiprocessor; left to itself, ptxas spills some registers to fit more
constexpr int kQueries = 16, kKeys = 64;  // one tile of scores
constexpr int kChunk = 64;                // channels in shared memory at a time
constexpr int kPitch = kChunk + 4;        // a row of them, shifted by four banks from the next
constexpr int kAcross = 16;               // threads across the keys of a tile: 4 keys each, and 2 queries
constexpr int kMaxSplits = 8;             // splits of the keys in stats_kernel and row_kernel
constexpr int kLanes = 16;                // row_kernel: threads of one key
constexpr int kGroups = kThreads / kLanes;
constexpr int kEach = 4;  // keys of a group at a time, all on the way at once
constexpr float kLog2e = 1.4426950408889634f;

struct Tile {
  int seq;    // -1: no such tile
  int first;  // first row of the tile within its sequence
};

// Tile number `tile` when every sequence is cut into tiles of `size` rows. The host only knows an upper bound of their
// count.
__device__ Tile find_tile(const int32_t* cu, int batch, int tile, int size) {
  for (int seq = 0; seq < batch; ++seq) {
    const int tiles = (cu[seq + 1] - cu[seq] + size - 1) / size;
    if (tile < tiles) return {seq, tile * size};
    tile -= tiles;
  }
  return {-1, 0};
}

int64_t max_tiles(int64_t rows, int64_t batch, int64_t size) { return rows / size + batch; }

int64_t key_splits(const TokenScoreParams& p) {
  const int64_t tiles = ceil_div(p.rows_k, kKeys);
  return tiles < kMaxSplits ? tiles : kMaxSplits;
}

// (largest score, sum of exponentials) [splits, rows_q, heads_q], then column sums, or row_kernel's scores, [heads_q,
// rows_k].
struct Scratch {
  float2* stats;
  float* columns;
};

__host__ __device__ Scratch split_scratch(const TokenScoreParams& p, int splits) {
  return {reinterpret_cast<float2*>(p.scratch), p.scratch + 2 * splits * p.rows_q * p.heads_q};
}

// Its rows are read four floats at a time.
struct alignas(16) Shared {
  float q[kQueries][kPitch];
  float k[kKeys][kPitch];
};
static_assert(alignof(Shared) % alignof(float4) == 0 && sizeof(Shared::q[0]) % alignof(float4) == 0,
              "a row that begins at no multiple of a float4 cannot be read as such");

// Channels [c0, c0 + kChunk) of ROWS rows into shared memory, zeros outside the sequence or the head.
template <class T, int V, int ROWS>
__device__ void load_tile(const T* from, int64_t stride, int rows, int c0, int dim, float (*to)[kPitch]) {
  constexpr int kPacks = kChunk / V;
  for (int i = threadIdx.x; i < ROWS * kPacks; i += kThreads) {
    const int row = i / kPacks, c = i % kPacks * V;
    float x[V] = {};
    if (row < rows && c0 + c < dim) load(from + row * stride + c0 + c, x);
#pragma unroll
    for (int j = 0; j < V; ++j) to[row][c + j] = x[j];
  }
}

// One (sequence, head): where its rows are and which keys a query sees.
template <class T>
struct Head {
  const T* q;
  const T* k;
  int64_t q_stride, k_stride;
  int nq, nk, dim;
  float scale;  // in log2 units

  __device__ Head(const TokenScoreParams& p, int seq, int head)
      : q_stride(p.q_stride), k_stride(p.k_stride), dim(static_cast<int>(p.dim)), scale(p.scale * kLog2e) {
    const int q0 = p.cu_q[seq], k0 = p.cu_k[seq];
    nq = p.cu_q[seq + 1] - q0;
    nk = p.cu_k[seq + 1] - k0;
    const int kv_head = head / static_cast<int>(p.heads_q / p.heads_kv);
    q = static_cast<const T*>(p.q) + q0 * q_stride + static_cast<int64_t>(head) * dim;
    k = static_cast<const T*>(p.k) + k0 * k_stride + static_cast<int64_t>(kv_head) * dim;
  }
  __device__ bool sees(int query, int key) const { return query < nq && key < nk && key <= nk - nq + query; }
};

// Scores of this thread's 2 queries and 4 keys; -inf where the query does not see the key.
template <class T, int V>
__device__ void score_tile(const Head<T>& head, Shared& shared, int query0, int key0, float (&score)[2][4]) {
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
#pragma unroll
  for (int a = 0; a < 2; ++a) {
#pragma unroll
    for (int b = 0; b < 4; ++b) score[a][b] = 0.0f;
  }
  for (int c0 = 0; c0 < head.dim; c0 += kChunk) {
    __syncthreads();  // the previous tile is no longer read
    load_tile<T, V, kQueries>(head.q + query0 * head.q_stride, head.q_stride, head.nq - query0, c0, head.dim, shared.q);
    load_tile<T, V, kKeys>(head.k + key0 * head.k_stride, head.k_stride, head.nk - key0, c0, head.dim, shared.k);
    __syncthreads();
    const int channels = min(kChunk, head.dim - c0);
    for (int c = 0; c < channels; c += 4) {
      float4 q[2], k[4];
#pragma unroll
      for (int a = 0; a < 2; ++a) q[a] = *reinterpret_cast<const float4*>(&shared.q[down * 2 + a][c]);
#pragma unroll
      for (int b = 0; b < 4; ++b) k[b] = *reinterpret_cast<const float4*>(&shared.k[across + b * kAcross][c]);
#pragma unroll
      for (int a = 0; a < 2; ++a) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          score[a][b] += q[a].x * k[b].x + q[a].y * k[b].y + q[a].z * k[b].z + q[a].w * k[b].w;
        }
      }
    }
  }
#pragma unroll
  for (int a = 0; a < 2; ++a) {
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const bool seen = head.sees(query0 + down * 2 + a, key0 + across + b * kAcross);
      score[a][b] = seen ? score[a][b] * head.scale : -INFINITY;
    }
  }
}

// e^(x - top) in log2 units, 0 when nothing was seen (both -inf).
__device__ float weight(float x, float top) { return top == -INFINITY ? 0.0f : exp2f(x - top); }

// Block (tile of queries, head, split of the keys).
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kMinBlocks) stats_kernel(TokenScoreParams p, int splits) {
  __shared__ Shared shared;
  const int heads = static_cast<int>(p.heads_q), split = blockIdx.x % splits, h = blockIdx.x / splits % heads;
  const Tile tile = find_tile(p.cu_q, static_cast<int>(p.batch), blockIdx.x / splits / heads, kQueries);
  if (tile.seq < 0) return;
  const Head<T> head(p, tile.seq, h);
  const int per_split = (head.nk + splits * kKeys - 1) / (splits * kKeys) * kKeys;
  const int visible = min(head.nk, head.nk - head.nq + min(tile.first + kQueries, head.nq));
  const int begin = split * per_split, end = min(visible, begin + per_split);
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  for (int key0 = begin; key0 < end; key0 += kKeys) {
    float score[2][4];
    score_tile<T, V>(head, shared, tile.first, key0, score);
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      const float best = fmaxf(top[a], fmaxf(fmaxf(score[a][0], score[a][1]), fmaxf(score[a][2], score[a][3])));
      sum[a] *= weight(top[a], best);
      top[a] = best;
#pragma unroll
      for (int b = 0; b < 4; ++b) sum[a] += weight(score[a][b], best);
    }
  }
#pragma unroll
  for (int a = 0; a < 2; ++a) {
#pragma unroll
    for (int offset = kAcross / 2; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, top[a], offset), more = __shfl_xor_sync(kAllLanes, sum[a], offset);
      const float best = fmaxf(top[a], other);
      sum[a] = sum[a] * weight(top[a], best) + more * weight(other, best);
      top[a] = best;
    }
    const int query = tile.first + threadIdx.x / kAcross * 2 + a;
    if (threadIdx.x % kAcross == 0 && query < head.nq) {
      const int64_t row = static_cast<int64_t>(split) * p.rows_q + p.cu_q[tile.seq] + query;
      split_scratch(p, splits).stats[row * heads + h] = make_float2(top[a], sum[a]);
    }
  }
}

// Largest score and one over the softmax denominator of a query row; (0, 0) when it sees no key.
__device__ float2 row_stats(const TokenScoreParams& p, int splits, int64_t row, int h) {
  const float2* stats = split_scratch(p, splits).stats + row * p.heads_q + h;
  const int64_t step = p.rows_q * p.heads_q;
  float top = -INFINITY, sum = 0.0f;
  for (int s = 0; s < splits; ++s) top = fmaxf(top, stats[s * step].x);
  for (int s = 0; s < splits; ++s) sum += stats[s * step].y * weight(stats[s * step].x, top);
  return top == -INFINITY ? make_float2(0.0f, 0.0f) : make_float2(top, 1.0f / sum);
}

// Block (tile of keys, head): its columns' sums over all query rows.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kMinBlocks) column_kernel(TokenScoreParams p, int splits) {
  __shared__ Shared shared;
  __shared__ float2 stats[kQueries];
  __shared__ double part[kThreads / kAcross][kKeys];
  const int heads = static_cast<int>(p.heads_q), h = blockIdx.x % heads;
  const Tile tile = find_tile(p.cu_k, static_cast<int>(p.batch), blockIdx.x / heads, kKeys);
  if (tile.seq < 0) return;
  const Head<T> head(p, tile.seq, h);
  const int thread = threadIdx.x, across = thread % kAcross, down = thread / kAcross;
  const int first_seeing = max(0, tile.first - (head.nk - head.nq));
  double column[4] = {};  // many small terms
  for (int query0 = first_seeing / kQueries * kQueries; query0 < head.nq; query0 += kQueries) {
    __syncthreads();  // the previous stats are no longer read
    if (thread < kQueries && query0 + thread < head.nq) {
      stats[thread] = row_stats(p, splits, p.cu_q[tile.seq] + query0 + thread, h);
    }
    float score[2][4];
    score_tile<T, V>(head, shared, query0, tile.first, score);  // synchronises
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      if (query0 + down * 2 + a >= head.nq) continue;
      const float2 row = stats[down * 2 + a];
#pragma unroll
      for (int b = 0; b < 4; ++b) column[b] += exp2f(score[a][b] - row.x) * row.y;
    }
  }
#pragma unroll
  for (int b = 0; b < 4; ++b) part[down][across + b * kAcross] = column[b];
  __syncthreads();
  if (thread >= kKeys || tile.first + thread >= head.nk) return;
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kThreads / kAcross; ++i) sum += part[i][thread];
  split_scratch(p, splits).columns[h * p.rows_k + p.cu_k[tile.seq] + tile.first + thread] = static_cast<float>(sum);
}

// What `more` threads' keys add to a softmax denominator.
__device__ void merge(float2& stats, float2 more) {
  const float best = fmaxf(stats.x, more.x);
  stats.y = stats.y * weight(stats.x, best) + more.y * weight(more.x, best);
  stats.x = best;
}

// Block (sequence, split of the keys, head): the scores of the first query row, and the denominators of all rows. The
// host chooses it by the number of rows; should a sequence have several, the rest are computed in row_mean_kernel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kMinBlocks) row_kernel(TokenScoreParams p, int splits) {
  __shared__ float2 part[kGroups];
  const int heads = static_cast<int>(p.heads_q), h = blockIdx.x % heads;
  const int split = blockIdx.x / heads % splits, seq = blockIdx.x / heads / splits;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  wait_for_earlier_kernels();
  let_next_begin();
  const Head<T> head(p, seq, h);
  const Scratch scratch = split_scratch(p, splits);
  float* scores = scratch.columns + h * p.rows_k + p.cu_k[seq];
  const int per_split = (head.nk + splits * kGroups - 1) / (splits * kGroups) * kGroups, begin = split * per_split;
  for (int query = 0; query < head.nq; ++query) {
    const int end = min(begin + per_split, head.nk - head.nq + query + 1);
    float2 stats = make_float2(-INFINITY, 0.0f);
    for (int key0 = begin; key0 < end; key0 += kGroups * kEach) {
      float score[kEach] = {};
      for (int c = lane * V; c < head.dim; c += kLanes * V) {
        Pack<T, V> k[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          k[i] = load_pack<T, V>(head.k + min(key0 + i * kGroups + group, head.nk - 1) * head.k_stride + c);
        }
        float q[V];
        load(head.q + query * head.q_stride + c, q);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
          for (int j = 0; j < V; ++j) score[i] += q[j] * to_float(k[i].at[j]);
        }
      }
      float best = stats.x;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int key = key0 + i * kGroups + group;
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
          score[i] += __shfl_xor_sync(kAllLanes, score[i], offset);
        }
        score[i] = key < end ? score[i] * head.scale : -INFINITY;
        if (key < end && query == 0 && lane == 0) scores[key] = score[i];
        best = fmaxf(best, score[i]);
      }
      stats = make_float2(best, stats.y * weight(stats.x, best));
#pragma unroll
      for (int i = 0; i < kEach; ++i) stats.y += weight(score[i], best);
    }
    if (lane == 0) part[group] = stats;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < kGroups; ++i) merge(stats, part[i]);
      scratch.stats[(static_cast<int64_t>(split) * p.rows_q + p.cu_q[seq] + query) * heads + h] = stats;
    }
    __syncthreads();
  }
}

// Block (kWarp keys): each warp takes every kWarps-th head.
template <class T>
__global__ void __launch_bounds__(kThreads) row_mean_kernel(TokenScoreParams p, int splits) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ float2 stats[kThreads];
  __shared__ double part[kWarps][kWarp];
  wait_for_earlier_kernels();
  const Tile tile = find_tile(p.cu_k, static_cast<int>(p.batch), blockIdx.x, kWarp);
  if (tile.seq < 0) return;
  const int heads = static_cast<int>(p.heads_q), warp = threadIdx.x / kWarp, key = tile.first + threadIdx.x % kWarp;
  const int q0 = p.cu_q[tile.seq], nq = p.cu_q[tile.seq + 1] - q0;
  const int k0 = p.cu_k[tile.seq], nk = p.cu_k[tile.seq + 1] - k0;
  const float* scores = split_scratch(p, splits).columns + k0 + key;
  double sum = 0.0;
  for (int query = 0; query < nq; ++query) {
    const bool sees = key < nk && key <= nk - nq + query;
    for (int h0 = 0; h0 < heads; h0 += kThreads) {
      __syncthreads();  // the previous stats are no longer read
      const int mine = h0 + threadIdx.x;
      if (mine < heads) stats[threadIdx.x] = row_stats(p, splits, q0 + query, mine);
      __syncthreads();
      const int end = sees ? min(heads - h0, kThreads) : 0;
      if (query == 0) {
#pragma unroll 8
        for (int i = warp; i < end; i += kWarps) {
          sum += exp2f(__ldcg(scores + (h0 + i) * p.rows_k) - stats[i].x) * stats[i].y;
        }
        continue;
      }
      for (int i = warp; i < end; i += kWarps) {
        const Head<T> head(p, tile.seq, h0 + i);
        float score = 0.0f;
        for (int c = 0; c < head.dim; ++c) {
          score += to_float(head.q[query * head.q_stride + c]) * to_float(head.k[key * head.k_stride + c]);
        }
        sum += exp2f(score * head.scale - stats[i].x) * stats[i].y;
      }
    }
  }
  part[warp][threadIdx.x % kWarp] = sum;
  __syncthreads();
  if (warp > 0 || key >= nk) return;
  for (int i = 1; i < kWarps; ++i) sum += part[i][threadIdx.x];
  p.score[k0 + key] = nq > 0 ? static_cast<float>(sum / static_cast<double>(static_cast<int64_t>(nq) * heads)) : 0.0f;
}

__global__ void __launch_bounds__(kThreads) mean_kernel(TokenScoreParams p, int splits) {
  const int64_t key = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (key >= p.rows_k) return;
  const int seq = find_sequence(p.cu_k, static_cast<int>(p.batch), static_cast<int>(key));
  const int nq = p.cu_q[seq + 1] - p.cu_q[seq];
  double sum = 0.0;
  for (int64_t h = 0; h < p.heads_q; ++h) sum += split_scratch(p, splits).columns[h * p.rows_k + key];
  p.score[key] = nq > 0 ? static_cast<float>(sum / static_cast<double>(nq * p.heads_q)) : 0.0f;
}

template <class T, int V>
void run(const TokenScoreParams& p, void* stream) {
  const int splits = static_cast<int>(key_splits(p));
  if (p.rows_q <= p.batch) {
    launch_early(row_kernel<T, V>, p.batch * splits * p.heads_q, kThreads, 0, stream, p, splits);
    launch_early(row_mean_kernel<T>, max_tiles(p.rows_k, p.batch, kWarp), kThreads, 0, stream, p, splits);
    return;
  }
  const int64_t query_tiles = max_tiles(p.rows_q, p.batch, kQueries), key_tiles = max_tiles(p.rows_k, p.batch, kKeys);
  launch(stats_kernel<T, V>, query_tiles * p.heads_q * splits, kThreads, stream, p, splits);
  launch(column_kernel<T, V>, key_tiles * p.heads_q, kThreads, stream, p, splits);
  launch(mean_kernel, ceil_div(p.rows_k, kThreads), kThreads, stream, p, splits);
}

template <class T>
bool wide(const TokenScoreParams& p) {
  constexpr int V = kVec<T>;
  return p.dim % V == 0 && p.q_stride % V == 0 && p.k_stride % V == 0 && aligned(p.q) && aligned(p.k);
}

}  // namespace
}  // namespace cuda

int64_t token_score_cuda_scratch(const TokenScoreParams& p) {
  return 2 * cuda::key_splits(p) * p.rows_q * p.heads_q + p.heads_q * p.rows_k;
}

Status token_score_cuda(const TokenScoreParams& p, void* stream) {
  if (p.batch * p.rows_k == 0) return nullptr;
  if (p.rows_q * p.heads_q == 0) {
    cudaMemsetAsync(p.score, 0, p.rows_k * sizeof(float), static_cast<cudaStream_t>(stream));
    return cuda::launch_status();
  }
  cuda::by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = cuda::wide<T>(p) ? cuda::run<T, cuda::kVec<T>> : cuda::run<T, 1>;
    run(p, stream);
  });
  return cuda::launch_status();
}

}  // namespace dyvte
