// Weights are streamed once through tensor cores: they are the 16 x 16 operand of an mma, the up to 8 rows of x the
// 16 x 8 one. A block takes 16 rows of the weight at a time (a tile: two halves of 8, from where the epilogue needs
// them), its warps share out the channels and meet at the tile's end. Each lane always has kDepth steps of weights on
// the way, those of the next tile included, and asks for the first ones before it waits for the kernel that makes x.
#include "common.cuh"
#include "dyvte/decode_linear.h"
#include "tile.cuh"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 2;     // per multiprocessor: one computes while the other meets
constexpr int kMinBlocks = 3;  // registers for these, and one of the kernel that follows
constexpr int kHalf = 8;       // weight rows of half a tile
constexpr int kRows = static_cast<int>(kDecodeRows);
constexpr int kDepth = 2;  // steps

// Elements between the normalised rows in shared memory: an odd multiple of 64 bytes, so that the eight lanes that load
// together meet all banks.
__host__ __device__ int64_t shared_pitch(int64_t k) { return (k + kStep - 1) / kStep * kStep + kStep / 2; }

// RMS-normalises all rows of x into shared memory, rounded as rms_norm rounds. All threads must call it; a barrier must
// follow.
template <class T>
__device__ void normalise(const DecodeProduct& p, T* to, int64_t pitch) {
  constexpr int V = kVec<T>;
  __shared__ float squares[kWarps];
  const int rows = static_cast<int>(p.rows), warp = threadIdx.x / kWarp;
  const int share = rows == 1 ? 8 : rows == 2 ? 4 : rows <= 4 ? 2 : 1;  // warps of one row
  const int b = warp / share, step = share * kWarp * V;
  const int first = (warp % share * kWarp + threadIdx.x % kWarp) * V, end = b < rows ? static_cast<int>(p.k) : 0;
  const T *x = static_cast<const T*>(p.x) + b * p.x_stride, *norm = static_cast<const T*>(p.norm);
  float sum = 0.0f;
#pragma unroll 2
  for (int c = first; c < end; c += step) {
    float value[V];
    load(x + c, value);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += value[j] * value[j];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) squares[warp] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < share; ++i) total += squares[b * share + i];
  const float factor = 1.0f / sqrtf(total / static_cast<float>(p.k) + p.eps);
  for (int c = first; c < end; c += step) {
    float value[V], w[V];
    load(x + c, value);
    load(norm + c, w);
    Pack<T, V> pack;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T rounded;
      from_float(value[j] * factor, &rounded);
      from_float(to_float(rounded) * w[j], &pack.at[j]);
    }
    uint4 raw;  // stored as such: `store` is for global memory
    memcpy(&raw, &pack, sizeof(raw));
    *reinterpret_cast<uint4*>(to + b * pitch + c) = raw;
  }
}

template <class T>
__device__ float bias_of(const DecodeProduct& p, int64_t row) {
  return p.bias ? to_float(static_cast<const T*>(p.bias)[row]) : 0.0f;
}

// What the products differ in. `row`: the weight row that is number i of half `half` of a tile; a valid one also where
// it is past the end, for `finish` then drops it. `finish` takes the two products of x row b with rows i of the halves.

template <class Params>
struct Holds {
  Params p;
};

// Tiles of 16 consecutive rows.
template <class Params>
struct Plain : Holds<Params> {
  using Holds<Params>::p;

  __host__ __device__ int64_t tiles() const { return (p.product.n + 2 * kHalf - 1) / (2 * kHalf); }
  __device__ int64_t place(int tile, int half, int i) const {
    return static_cast<int64_t>(tile) * (2 * kHalf) + half * kHalf + i;
  }
  __device__ int64_t row(int tile, int half, int i) const {
    const int64_t row = place(tile, half, i);
    return row < p.product.n ? row : p.product.n - 1;
  }
};

template <class Element>
struct AddLinear : Plain<AddLinearParams> {
  using T = Element;
  static constexpr bool kNorm = false;

  __device__ void finish(int tile, int i, int b, float low, float high) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = place(tile, half, i);
      if (row >= p.product.n) return;
      T* to = static_cast<T*>(p.residual) + b * p.residual_stride + row;
      from_float(to_float(*to) + (half ? high : low) + bias_of<T>(p.product, row), to);
    }
  }
};

template <class Element>
struct NormLinear : Plain<NormLinearParams> {
  using T = Element;
  static constexpr bool kNorm = true;

  __device__ void finish(int tile, int i, int b, float low, float high) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = place(tile, half, i);
      if (row < p.product.n) p.out[b * p.product.n + row] = (half ? high : low) + bias_of<T>(p.product, row);
    }
  }
};

template <class Element>
struct NormGateUp : Holds<NormGateUpParams> {
  using T = Element;
  static constexpr bool kNorm = true;

  __host__ __device__ int64_t width() const { return p.product.n / 2; }
  __host__ __device__ int64_t tiles() const { return (width() + kHalf - 1) / kHalf; }
  __device__ int64_t row(int tile, int half, int i) const {
    const int64_t column = static_cast<int64_t>(tile) * kHalf + i;
    return half * width() + (column < width() ? column : width() - 1);
  }
  __device__ void finish(int tile, int i, int b, float gate, float up) const {
    const int64_t column = static_cast<int64_t>(tile) * kHalf + i;
    if (column >= width()) return;
    gate += bias_of<T>(p.product, column);
    up += bias_of<T>(p.product, width() + column);
    from_float(up * gate / (1.0f + expf(-gate)), static_cast<T*>(p.out) + b * width() + column);
  }
};

// A tile: 8 channels of a head and those that they are rotated with, half a head further.
template <class Element>
struct NormQkvAppend : Holds<NormQkvAppendParams> {
  using T = Element;
  static constexpr bool kNorm = true;

  __host__ __device__ int64_t tiles() const { return p.product.n / (2 * kHalf); }
  __device__ int64_t row(int tile, int half, int i) const {
    const int turned = static_cast<int>(p.pool.dim) / 2, each = turned / kHalf;
    return tile / each * p.pool.dim + half * turned + tile % each * kHalf + i;
  }
  __device__ void finish(int tile, int i, int b, float low, float high) const {
    const int dim = static_cast<int>(p.pool.dim), turned = dim / 2, each = turned / kHalf;
    const int head = tile / each, c = tile % each * kHalf + i;
    const int heads_q = static_cast<int>(p.heads_q), heads = static_cast<int>(p.pool.heads);
    low += bias_of<T>(p.product, static_cast<int64_t>(head) * dim + c);
    high += bias_of<T>(p.product, static_cast<int64_t>(head) * dim + turned + c);
    const bool is_v = head >= heads_q + heads;
    if (!is_v) {
      const float* angle = p.cos_sin + static_cast<int64_t>(p.positions[b]) * dim + c;
      const float cos = angle[0], sin = angle[turned], x = low;
      low = x * cos - high * sin;
      high = high * cos + x * sin;
    }
    T* to = static_cast<T*>(p.q) + (static_cast<int64_t>(b) * heads_q + head) * dim;
    if (head >= heads_q) {
      const int64_t at = pool_row(p.block_table + b * p.table_stride, static_cast<unsigned>(p.lens[b]),
                                  static_cast<unsigned>(p.pool.page));
      to = static_cast<T*>(is_v ? p.pool.v : p.pool.k) + (at * heads + (head - heads_q) % heads) * dim;
    }
    from_float(low, to + c);
    from_float(high, to + turned + c);
  }
};

template <class Job>
__global__ void __launch_bounds__(kThreads, kMinBlocks) product_kernel(Job job) {
  using T = typename Job::T;
  // Two of them: a tile's sums are written while the last one's may still be read, and one barrier a tile suffices.
  __shared__ float2 part[2][kWarps][2 * kHalf][kRows / 2];
  const DecodeProduct& p = job.p.product;
  const int tiles = static_cast<int>(job.tiles()), k = static_cast<int>(p.k), rows = static_cast<int>(p.rows);
  const int warp = threadIdx.x / kWarp, group = threadIdx.x % kWarp / 4, quad = threadIdx.x % 4;
  const int first = warp * kStep + quad * kVec<T>;  // this lane's first channel
  const int steps = (k + kWarps * kStep * kDepth - 1) / (kWarps * kStep * kDepth) * kDepth;

  int tile = blockIdx.x;
  const T *weight = static_cast<const T*>(p.weight), *row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) row[half] = weight + job.row(tile, half, group) * p.weight_stride;
  Packs packs[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) packs[d] = fetch(row, first + d * kWarps * kStep, k);
  if constexpr (Job::kNorm) {
    constexpr int kLine = 128 / sizeof(T);
#pragma unroll 1
    for (int c = threadIdx.x * kLine; c < k; c += kThreads * kLine) prefetch(static_cast<const T*>(p.norm) + c);
  }

  wait_for_earlier_kernels();
  let_next_begin();
  const T* x = static_cast<const T*>(p.x) + group * p.x_stride;
  if constexpr (Job::kNorm) {
    T* normalised = static_cast<T*>(dynamic_shared());
    normalise(p, normalised, shared_pitch(k));
    __syncthreads();
    x = normalised + group * shared_pitch(k);
  }

  for (int turn = 0; tile < tiles; turn ^= 1) {
    const int next = tile + static_cast<int>(gridDim.x);
    float sum[4] = {};
    for (int step = 0; step < steps; step += kDepth) {
      const bool last = step + kDepth == steps;  // then what follows is of the next tile, if there is one
      if (last && next < tiles) {
#pragma unroll
        for (int half = 0; half < 2; ++half) row[half] = weight + job.row(next, half, group) * p.weight_stride;
      }
      const int behind = last ? first : first + (step + kDepth) * kWarps * kStep, end = last && next >= tiles ? 0 : k;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int c = first + (step + d) * kWarps * kStep;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint4 of_x = {};
          if (group < rows && c + i * kStep / 2 < k) of_x = *reinterpret_cast<const uint4*>(x + c + i * kStep / 2);
          multiply<T>(sum, packs[d].at[i][0], packs[d].at[i][1], of_x);
        }
        packs[d] = fetch(row, behind + d * kWarps * kStep, end);
      }
    }
    part[turn][warp][group][quad] = make_float2(sum[0], sum[1]);
    part[turn][warp][kHalf + group][quad] = make_float2(sum[2], sum[3]);
    __syncthreads();
    const int b = threadIdx.x / kHalf, i = threadIdx.x % kHalf;
    if (b < rows) {
      float low = 0.0f, high = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 *a = &part[turn][w][i][b / 2], *c = &part[turn][w][kHalf + i][b / 2];
        low += b % 2 ? a->y : a->x;
        high += b % 2 ? c->y : c->x;
      }
      job.finish(tile, i, b, low, high);
    }
    tile = next;
  }
}

template <class Job>
void run(const Job& job, void* stream) {
  const int64_t tiles = job.tiles(), most = int64_t{kBlocks} * multiprocessors();
  const DecodeProduct& p = job.p.product;
  const int64_t shared = Job::kNorm ? p.rows * shared_pitch(p.k) * static_cast<int64_t>(sizeof(typename Job::T)) : 0;
  launch_early(product_kernel<Job>, tiles < most ? tiles : most, kThreads, shared, stream, job);
}

// Runs Job<element type>, which holds nothing but the parameters.
template <template <class> class Job, class Params>
Status run_half(const Params& p, void* stream) {
  if (p.product.rows * p.product.n == 0) return nullptr;
  if (p.product.dtype == DType::f16) run(Job<__half>{{p}}, stream);
  if (p.product.dtype == DType::bf16) run(Job<__nv_bfloat16>{{p}}, stream);
  return launch_status();
}

}  // namespace
}  // namespace cuda

Status norm_gate_up_cuda(const NormGateUpParams& p, void* stream) {
  return cuda::run_half<cuda::NormGateUp>(p, stream);
}

Status add_linear_cuda(const AddLinearParams& p, void* stream) { return cuda::run_half<cuda::AddLinear>(p, stream); }

Status norm_linear_cuda(const NormLinearParams& p, void* stream) { return cuda::run_half<cuda::NormLinear>(p, stream); }

Status norm_qkv_append_cuda(const NormQkvAppendParams& p, void* stream) {
  return cuda::run_half<cuda::NormQkvAppend>(p, stream);
}

}  // namespace dyvte
