// Two launches. `pool_kernel` averages the token states. Then W1 is streamed once for each group of sequences (later
// groups find it in L2): by `tile_kernel` through tensor cores, or by `mlp_kernel` where these do not take the type or
// the sizes. The last block adds the partial logits in a fixed order and decides.
#include <type_traits>

#include "common.cuh"
#include "dyvte/exit_head.h"
#include "tile.cuh"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kPoolLanes = 16;  // threads that share a row of the pooled columns; the other factor walks the rows
constexpr int kMlpThreads = 128;
constexpr int kMlpWarps = kMlpThreads / kWarp;
constexpr int kMlpMinBlocks = 2;  // per multiprocessor; left to itself, ptxas spills some registers to fit more
constexpr int kRows = 2;          // of W1 per warp

// tile_kernel: one block per multiprocessor, with all of a tile's channels, so that x is read once for 16 rows of W1.
constexpr int kTileThreads = 512;
constexpr int kTileWarps = kTileThreads / kWarp;
constexpr int kTileRegisters = 640;  // for so many threads: there is room for a block of pool_kernel, too
constexpr int kUnits = 16;           // inner units of a tile: rows of W1, the 16 x 16 operand of an mma
constexpr int kSeqs = 8;             // sequences at a time: the 16 x 8 one
constexpr int kStride = kTileWarps * kStep;

// Regions of the scratch buffer, in floats.
struct Scratch {
  float* pooled;   // [batch, n_states * d]
  float* squares;  // [batch, n_states, chunks]: sums of squares of the pooled columns
  float* logits;   // [mlp blocks, batch, 2]
  unsigned* done;  // mlp blocks that have written their logits
};

__host__ __device__ int64_t pool_chunks(const ExitHeadParams& p, int pack) {
  return (p.d + kPoolLanes * pack - 1) / (kPoolLanes * pack);
}

__host__ __device__ int64_t padded(int64_t floats) { return (floats + 3) / 4 * 4; }

__host__ __device__ int64_t max_mlp_blocks(const ExitHeadParams& p) {
  return (p.inner + kMlpWarps * kRows - 1) / (kMlpWarps * kRows);
}

__host__ __device__ Scratch split_scratch(const ExitHeadParams& p) {
  Scratch s;
  s.pooled = p.scratch;
  s.squares = s.pooled + padded(p.batch * p.n_states * p.d);
  s.logits = s.squares + padded(p.batch * p.n_states * pool_chunks(p, 1));
  s.done = reinterpret_cast<unsigned*>(s.logits + max_mlp_blocks(p) * p.batch * 2);
  return s;
}

// The rows one pooled state averages: numbers ids[i], or first + i without ids.
struct StateRows {
  const int32_t* ids;
  int first, count;
};

__device__ StateRows state_rows(const ExitHeadParams& p, int seq, int bit) {
  if (bit == kMeanVisual || bit == kLastVisual) {
    const int begin = p.visual_cu[seq], count = p.visual_cu[seq + 1] - begin;
    if (bit == kMeanVisual || count <= 0) return {p.visual_rows + begin, 0, count};
    return {p.visual_rows + begin + count - 1, 0, 1};
  }
  const int begin = p.text_ranges[2 * seq], count = p.text_ranges[2 * seq + 1] - begin;
  if (bit == kMeanText) return {nullptr, begin, count > 1 ? count - 1 : count};
  return {nullptr, begin + count - 1, min(count, 1)};
}

__device__ int nth_state(int states, int n) {
  int bit = 1;
  while (n > 0 || !(states & bit)) {
    if (states & bit) --n;
    bit *= 2;
  }
  return bit;
}

__device__ bool is_active(const ExitHeadParams& p, int seq) {
  for (int bit = 1; bit <= kLastText; bit *= 2) {
    if ((p.states & bit) && state_rows(p, seq, bit).count <= 0) return false;
  }
  return true;
}

// Block (sequence, state, chunk of kPoolLanes * V columns): 16 threads across the columns, 16 down the rows.
template <class T, int V>
__global__ void __launch_bounds__(kPoolThreads) pool_kernel(ExitHeadParams p) {
  constexpr int kColumns = kPoolLanes * V, kDown = kPoolThreads / kPoolLanes;
  __shared__ float part[kDown][kColumns];
  const int chunks = static_cast<int>(pool_chunks(p, V)), chunk = blockIdx.x % chunks;
  const int state = blockIdx.x / chunks % p.n_states, seq = blockIdx.x / chunks / p.n_states;
  const Scratch scratch = split_scratch(p);
  wait_for_earlier_kernels();
  let_next_begin();
  if (blockIdx.x == 0 && threadIdx.x == 0) *scratch.done = 0;

  const StateRows rows = state_rows(p, seq, nth_state(p.states, state));
  const int across = threadIdx.x % kPoolLanes, down = threadIdx.x / kPoolLanes;
  const int64_t column = static_cast<int64_t>(chunk) * kColumns + across * V;
  float sum[V] = {};
  if (column < p.d) {
#pragma unroll 4
    for (int i = down; i < rows.count; i += kDown) {
      const int64_t row = rows.ids ? rows.ids[i] : rows.first + i;
      float x[V];
      load(static_cast<const T*>(p.hidden) + row * p.hidden_stride + column, x);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += x[j];
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) part[down][across * V + j] = sum[j];
  __syncthreads();

  float mean = 0.0f;
  const int64_t mine = static_cast<int64_t>(chunk) * kColumns + threadIdx.x;
  if (threadIdx.x < kColumns && mine < p.d) {
#pragma unroll
    for (int i = 0; i < kDown; ++i) mean += part[i][threadIdx.x];
    mean /= static_cast<float>(max(rows.count, 1));
    scratch.pooled[(static_cast<int64_t>(seq) * p.n_states + state) * p.d + mine] = mean;
  }
  if (p.rms_eps < 0) return;
  const float squares = block_sum<kPoolThreads>(mean * mean);
  if (threadIdx.x == 0) scratch.squares[(static_cast<int64_t>(seq) * p.n_states + state) * chunks + chunk] = squares;
}

// One over the root mean square of a pooled vector, or 1. Called by whole warps.
__device__ float rms_factor(const ExitHeadParams& p, const Scratch& scratch, int64_t vector, int chunks) {
  if (p.rms_eps < 0) return 1.0f;
  float sum = 0.0f;
  for (int i = threadIdx.x % kWarp; i < chunks; i += kWarp) sum += scratch.squares[vector * chunks + i];
  return 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(p.d) + p.rms_eps);
}

// sum[r][b] += this lane's share of W1[row + r] . pooled[seq + b]. Indices past the end repeat the last one: the memory
// is valid and the result is dropped.
template <class T, int V, int R, int NB>
__device__ void dot_products(const ExitHeadParams& p, const Scratch& scratch, int row, int seq, int chunks,
                             float (&sum)[R][NB]) {
  const int64_t width = p.n_states * p.d;
  const int last_row = static_cast<int>(p.inner) - 1, last_seq = static_cast<int>(p.batch) - 1;
  const T* w1 = static_cast<const T*>(p.w1);
  for (int state = 0; state < p.n_states; ++state) {
    float factor[NB];
#pragma unroll
    for (int b = 0; b < NB; ++b) {
      factor[b] = rms_factor(p, scratch, static_cast<int64_t>(min(seq + b, last_seq)) * p.n_states + state, chunks);
    }
#pragma unroll(NB == 1 ? 4 : 2)
    for (int64_t c = threadIdx.x % kWarp * V; c < p.d; c += kWarp * V) {
      Pack<T, V> w[R];
#pragma unroll
      for (int r = 0; r < R; ++r) w[r] = load_pack<T, V>(w1 + min(row + r, last_row) * width + state * p.d + c);
#pragma unroll
      for (int b = 0; b < NB; ++b) {
        float x[V];
        load(scratch.pooled + min(seq + b, last_seq) * width + state * p.d + c, x);
#pragma unroll
        for (int j = 0; j < V; ++j) x[j] *= factor[b];
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int j = 0; j < V; ++j) sum[r][b] += to_float(w[r].at[j]) * x[j];
        }
      }
    }
  }
}

// What an inner unit adds before its GELU, and how much of that goes into the two logits.
struct Unit {
  float bias = 0.0f, keep = 0.0f, exit = 0.0f;
};

template <class T>
__device__ Unit load_unit(const ExitHeadParams& p, int unit) {
  const T *w2 = static_cast<const T*>(p.w2), *b1 = static_cast<const T*>(p.b1);
  if (unit >= p.inner) return {};
  return {b1 ? to_float(b1[unit]) : 0.0f, to_float(w2[unit]), to_float(w2[p.inner + unit])};
}

__device__ float2 logits_of(const Unit& unit, float x) {
  x += unit.bias;
  const float gelu = 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  return make_float2(gelu * unit.keep, gelu * unit.exit);
}

// This warp's share of the two logits of sequence seq + b, in lanes b < NB, from its R inner units.
template <class T, int R, int NB>
__device__ float2 warp_logits(const ExitHeadParams& p, int row, const float (&sum)[R][NB]) {
  const int lane = threadIdx.x % kWarp, unit = row + lane / NB;
  float mine = 0.0f;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int b = 0; b < NB; ++b) {
      const float total = warp_sum(sum[r][b]);
      if (lane == r * NB + b) mine = total;
    }
  }
  float2 logits = make_float2(0.0f, 0.0f);
  if (lane < R * NB) logits = logits_of(load_unit<T>(p, unit), mine);
#pragma unroll
  for (int r = R / 2; r > 0; r /= 2) {
    logits.x += __shfl_down_sync(kAllLanes, logits.x, r * NB);
    logits.y += __shfl_down_sync(kAllLanes, logits.y, r * NB);
  }
  return logits;
}

template <int WARPS>
__device__ void decide(const ExitHeadParams& p, const Scratch& scratch) {
  for (int seq = threadIdx.x / kWarp; seq < p.batch; seq += WARPS) {
    const bool active = is_active(p, seq);
    float keep = 0.0f, exit = 0.0f;
#pragma unroll 4
    for (int64_t block = threadIdx.x % kWarp; block < gridDim.x; block += kWarp) {
      const float* logits = scratch.logits + (block * p.batch + seq) * 2;
      keep += __ldcg(logits);
      exit += __ldcg(logits + 1);
    }
    keep = warp_sum(keep);
    exit = warp_sum(exit);
    if (threadIdx.x % kWarp != 0) continue;
    const float probability = active ? 1.0f / (1.0f + expf(keep - exit)) : 0.0f;
    p.p_exit[seq] = probability;
    p.exit[seq] = active && probability > p.threshold;
  }
}

// Each warp owns R inner units, for NB sequences at a time.
template <class T, int V, int R, int NB>
__global__ void __launch_bounds__(kMlpThreads, kMlpMinBlocks) mlp_kernel(ExitHeadParams p, int chunks) {
  static_assert(R * NB <= kWarp, "one lane per (unit, sequence)");
  __shared__ float2 part[kMlpWarps][NB];
  const Scratch scratch = split_scratch(p);
  const int warp = threadIdx.x / kWarp, row = (blockIdx.x * kMlpWarps + warp) * R;
  for (int seq = 0; seq < p.batch; seq += NB) {
    float sum[R][NB] = {};
    dot_products<T, V, R, NB>(p, scratch, row, seq, chunks, sum);
    const float2 logits = warp_logits<T, R, NB>(p, row, sum);
    if (threadIdx.x % kWarp < NB) part[warp][threadIdx.x % kWarp] = logits;
    __syncthreads();
    if (threadIdx.x < NB && seq + threadIdx.x < p.batch) {
      float2 total = part[0][threadIdx.x];
      for (int w = 1; w < kMlpWarps; ++w) {
        total.x += part[w][threadIdx.x].x;
        total.y += part[w][threadIdx.x].y;
      }
      float* to = scratch.logits + (blockIdx.x * p.batch + seq + threadIdx.x) * 2;
      to[0] = total.x;
      to[1] = total.y;
    }
    __syncthreads();
  }
  if (last_to_arrive(scratch.done, gridDim.x)) decide<kMlpWarps>(p, scratch);
}

// sum += W1 x. Each x is the sum of numbers of T, as many as hold its 24 bits.
template <class T>
__device__ __forceinline__ void multiply_exactly(float (&sum)[4], const uint4& low, const uint4& high,
                                                 float (&x)[kVec<T>]) {
  constexpr int kParts = std::is_same_v<T, __half> ? 2 : 3;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    Pack<T, kVec<T>> part;
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      from_float(x[j], &part.at[j]);
      x[j] -= to_float(part.at[j]);
    }
    uint4 of_x;
    memcpy(&of_x, &part, sizeof(of_x));
    multiply<T>(sum, low, high, of_x);
  }
}

// A block takes kUnits inner units and kSeqs sequences at a time; its warps share out the channels. The first weights
// are on the way before the pooled states are there.
template <class T>
__global__ void __launch_bounds__(kTileRegisters, 1) tile_kernel(ExitHeadParams p, int chunks) {
  constexpr int V = kVec<T>;
  __shared__ float factor[kSeqs][4];  // of each state
  __shared__ float2 part[kTileWarps][kUnits][kSeqs / 2];
  const Scratch scratch = split_scratch(p);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4, quad = lane % 4;
  const int d = static_cast<int>(p.d), states = p.n_states, width = states * d, batch = static_cast<int>(p.batch);
  const int unit0 = blockIdx.x * kUnits, last_unit = static_cast<int>(p.inner) - 1;
  const int first = warp * kStep + quad * V;  // this lane's first channel

  const auto w1 = [&](int unit) { return static_cast<const T*>(p.w1) + int64_t{min(unit, last_unit)} * width; };
  const T* const row[2] = {w1(unit0 + group), w1(unit0 + kUnits / 2 + group)};
  Packs packs = fetch(row, first, width);
  const Unit unit = load_unit<T>(p, unit0 + threadIdx.x % kUnits);

  wait_for_earlier_kernels();
  for (int seq = 0; seq < batch; seq += kSeqs) {
    const int seqs = min(kSeqs, batch - seq);
    for (int i = warp; i < seqs * states; i += kTileWarps) {
      const float found = rms_factor(p, scratch, seq * states + i, chunks);
      if (lane == 0) factor[i / states][i % states] = found;
    }
    __syncthreads();  // and the last sequences' parts have been read
    const float* x = scratch.pooled + static_cast<int64_t>(seq + group) * width;
    float sum[4] = {};
    for (int step = 0; step < width; step += kStride) {
      const bool last = step + kStride >= width;  // then what follows is for the next sequences, if there are any
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = first + step + i * kStep / 2;
        float of_x[V] = {};
        if (group < seqs && c < width) {
          load(x + c, of_x);
          const float scale = factor[group][c / d];
#pragma unroll
          for (int k = 0; k < V; ++k) of_x[k] *= scale;
        }
        multiply_exactly<T>(sum, packs.at[i][0], packs.at[i][1], of_x);
      }
      packs = fetch(row, last ? first : first + step + kStride, last && seq + kSeqs >= batch ? 0 : width);
    }
    part[warp][group][quad] = make_float2(sum[0], sum[1]);
    part[warp][kUnits / 2 + group][quad] = make_float2(sum[2], sum[3]);
    __syncthreads();
    if (threadIdx.x < kUnits * kSeqs) {
      const int i = threadIdx.x % kUnits, b = threadIdx.x / kUnits;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kTileWarps; ++w) {
        const float2 pair = part[w][i][b / 2];
        total += b % 2 ? pair.y : pair.x;
      }
      float2 logits = logits_of(unit, total);
#pragma unroll
      for (int offset = kUnits / 2; offset > 0; offset /= 2) {
        logits.x += __shfl_xor_sync(kAllLanes, logits.x, offset);
        logits.y += __shfl_xor_sync(kAllLanes, logits.y, offset);
      }
      if (i == 0 && b < seqs) {
        float* to = scratch.logits + (static_cast<int64_t>(blockIdx.x) * batch + seq + b) * 2;
        to[0] = logits.x;
        to[1] = logits.y;
      }
    }
  }
  if (last_to_arrive(scratch.done, gridDim.x)) decide<kTileWarps>(p, scratch);
}

template <class T, int V, int NB>
void run_mlp(const ExitHeadParams& p, void* stream) {
  const int64_t blocks = ceil_div(p.inner, kMlpWarps * kRows);
  launch(mlp_kernel<T, V, kRows, NB>, blocks, kMlpThreads, stream, p, static_cast<int>(pool_chunks(p, V)));
}

template <class T, int V>
void run(const ExitHeadParams& p, void* stream) {
  const int64_t chunks = pool_chunks(p, V);
  launch_early(pool_kernel<T, V>, p.batch * p.n_states * chunks, kPoolThreads, 0, stream, p);
  if constexpr (sizeof(T) == 2 && V > 1) {
    launch_early(tile_kernel<T>, ceil_div(p.inner, kUnits), kTileThreads, 0, stream, p, static_cast<int>(chunks));
  } else {
    p.batch == 1 ? run_mlp<T, V, 1>(p, stream) : run_mlp<T, V, 4>(p, stream);
  }
}

template <class T>
bool wide(const ExitHeadParams& p) {
  constexpr int V = kVec<T>;
  return p.d % V == 0 && p.hidden_stride % V == 0 && aligned(p.hidden) && aligned(p.w1) && aligned(p.scratch);
}

}  // namespace
}  // namespace cuda

int64_t exit_head_cuda_scratch(const ExitHeadParams& p) {
  const int64_t pooled = cuda::padded(p.batch * p.n_states * p.d);
  const int64_t squares = cuda::padded(p.batch * p.n_states * cuda::pool_chunks(p, 1));
  return pooled + squares + cuda::max_mlp_blocks(p) * p.batch * 2 + 1;
}

Status exit_head_cuda(const ExitHeadParams& p, void* stream) {
  if (p.batch == 0) return nullptr;
  cuda::by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = cuda::wide<T>(p) ? cuda::run<T, cuda::kVec<T>> : cuda::run<T, 1>;
    run(p, stream);
  });
  return cuda::launch_status();
}

}  // namespace dyvte
