// Two launches. `pool_kernel` averages the token states; `mlp_kernel` streams W1 once per group of sequences (the
// second and later groups find it in L2), and its last block adds the partial logits in a fixed order and decides.
#include <type_traits>

#include "common.cuh"
#include "dyvte/exit_head.h"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kPoolLanes = 16;  // threads that share a row of the pooled columns; the other factor walks the rows
constexpr int kMlpThreads = 128;
constexpr int kMlpWarps = kMlpThreads / kWarp;
constexpr int kMlpMinBlocks = 2;  // per multiprocessor; left to itself, ptxas spills some registers to fit more
constexpr int kMinRows = 2;       // rows of W1 per warp, at least

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
  return (p.inner + kMlpWarps * kMinRows - 1) / (kMlpWarps * kMinRows);
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
  float keep = 0.0f, exit = 0.0f;
  if (lane < R * NB && unit < p.inner) {
    const T *w2 = static_cast<const T*>(p.w2), *b1 = static_cast<const T*>(p.b1);
    if (b1) mine += to_float(b1[unit]);
    const float gelu = 0.5f * mine * (1.0f + erff(mine * 0.70710678118654752f));
    keep = gelu * to_float(w2[unit]);
    exit = gelu * to_float(w2[p.inner + unit]);
  }
#pragma unroll
  for (int r = R / 2; r > 0; r /= 2) {
    keep += __shfl_down_sync(kAllLanes, keep, r * NB);
    exit += __shfl_down_sync(kAllLanes, exit, r * NB);
  }
  return make_float2(keep, exit);
}

__device__ void decide(const ExitHeadParams& p, const Scratch& scratch) {
  for (int seq = threadIdx.x / kWarp; seq < p.batch; seq += kMlpWarps) {
    float keep = 0.0f, exit = 0.0f;
    for (int64_t block = threadIdx.x % kWarp; block < gridDim.x; block += kWarp) {
      const float* logits = scratch.logits + (block * p.batch + seq) * 2;
      keep += __ldcg(logits);
      exit += __ldcg(logits + 1);
    }
    keep = warp_sum(keep);
    exit = warp_sum(exit);
    if (threadIdx.x % kWarp != 0) continue;
    const float probability = is_active(p, seq) ? 1.0f / (1.0f + expf(keep - exit)) : 0.0f;
    p.p_exit[seq] = probability;
    p.exit[seq] = is_active(p, seq) && probability > p.threshold;
  }
}

// Each warp owns R inner units, for NB sequences at a time.
template <class T, int V, int R, int NB>
__global__ void __launch_bounds__(kMlpThreads, kMlpMinBlocks) mlp_kernel(ExitHeadParams p, int chunks) {
  static_assert(R >= kMinRows && R * NB <= kWarp, "one lane per (unit, sequence)");
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
  if (last_to_arrive(scratch.done, gridDim.x)) decide(p, scratch);
}

template <class T, int V, int R, int NB>
void run_mlp(const ExitHeadParams& p, void* stream) {
  const int64_t blocks = ceil_div(p.inner, kMlpWarps * R);
  launch(mlp_kernel<T, V, R, NB>, blocks, kMlpThreads, stream, p, static_cast<int>(pool_chunks(p, V)));
}

template <class T, int V>
void run(const ExitHeadParams& p, void* stream) {
  launch(pool_kernel<T, V>, p.batch * p.n_states * pool_chunks(p, V), kPoolThreads, stream, p);
  if (p.batch == 1) {
    run_mlp<T, V, kMinRows, 1>(p, stream);
  } else if (p.batch <= 4) {
    run_mlp<T, V, kMinRows, 4>(p, stream);
  } else {
    run_mlp<T, V, 4, 8>(p, stream);
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
