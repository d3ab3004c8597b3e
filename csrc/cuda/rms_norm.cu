#include <type_traits>

#include "common.cuh"
#include "dyvte/rms_norm.h"
#include "ptx.cuh"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostThreads = 1024;  // of a block that holds a row in registers
constexpr int kGoodThreads = 640;   // beyond, each thread holds two packs, so that more blocks fit
constexpr int kLine = 128;          // bytes

// Rows of x, of the residual stream and of the result, by the row's number.
template <class T>
struct RowOf {
  const T* x;
  T* residual;  // or null
  T* out;

  __device__ RowOf(const RmsNormParams& p, unsigned row) {
    const unsigned inner = static_cast<unsigned>(p.inner), o = row / inner, i = row % inner;
    x = static_cast<const T*>(p.x) + o * p.x_outer + i * p.x_inner;
    residual = p.residual ? static_cast<T*>(p.residual) + o * p.res_outer + i * p.res_inner : nullptr;
    out = static_cast<T*>(p.out) + row * p.d;
  }
};

__device__ __forceinline__ float factor_of(float squares, const RmsNormParams& p) {
  return 1.0f / sqrtf(squares / static_cast<float>(p.d) + p.eps);
}

// value += old, rounded as the residual stream is.
template <class T, int V>
__device__ __forceinline__ void add_rounded(float (&value)[V], const Pack<T, V>& old) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    T rounded;
    from_float(value[j] + to_float(old.at[j]), &rounded);
    value[j] = to_float(rounded);
  }
}

template <class T, int V>
__device__ __forceinline__ void store_normalised(T* to, float (&value)[V], float factor, const Pack<T, V>& weight) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    T rounded;
    from_float(value[j] * factor, &rounded);
    value[j] = to_float(rounded) * to_float(weight.at[j]);
  }
  store(to, value);
}

// GROUP threads per row: a warp for short rows (heads), a block for long ones that no registers hold.
template <class T, int V, int GROUP>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormParams p) {
  wait_for_earlier_kernels();
  const unsigned row = blockIdx.x * (kThreads / GROUP) + threadIdx.x / GROUP;
  if (row >= p.outer * p.inner) return;  // whole warps; never within a block that synchronises
  const RowOf<T> at(p, row);
  const int64_t first = threadIdx.x % GROUP * V;

  float sum = 0.0f;
  for (int64_t c = first; c < p.d; c += GROUP * V) {
    float value[V];
    load(at.x + c, value);
    if (at.residual) {
      add_rounded(value, load_pack<T, V>(at.residual + c));
      store(at.residual + c, value);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) sum += value[j] * value[j];
  }
  sum = GROUP == kWarp ? warp_sum(sum) : block_sum<kThreads>(sum);
  const float factor = factor_of(sum, p);

  const T* from = at.residual ? at.residual : at.x;  // each thread reads back what it wrote itself
  for (int64_t c = first; c < p.d; c += GROUP * V) {
    float value[V];
    load(from + c, value);
    store_normalised(at.out + c, value, factor, load_pack<T, V>(static_cast<const T*>(p.weight) + c));
  }
}

// A block of `threads` per row, each with PACKS packs of it in registers. A decoding step has few rows, and what it
// waits for is memory: all loads are on the way at once, and the weight's before the row is there.
template <class T, int V, int PACKS>
__global__ void __launch_bounds__(kMostThreads) held_row_kernel(RmsNormParams p, int threads) {
  __shared__ float part[kWarp];
  const T* weight = static_cast<const T*>(p.weight);
  const int lane = threadIdx.x % kWarp, d = static_cast<int>(p.d);
#pragma unroll
  for (int i = 0; i < PACKS; ++i) {
    const int c = (i * threads + static_cast<int>(threadIdx.x)) * V;
    if (c < d && threadIdx.x * (sizeof(T) * V) % kLine == 0) prefetch(weight + c);
  }

  wait_for_earlier_kernels();
  const RowOf<T> at(p, blockIdx.x);
  Pack<T, V> x[PACKS] = {}, old[PACKS] = {}, w[PACKS] = {};
#pragma unroll
  for (int i = 0; i < PACKS; ++i) {
    const int c = (i * threads + static_cast<int>(threadIdx.x)) * V;
    if (c >= d) continue;
    x[i] = load_pack<T, V>(at.x + c);
    if (at.residual) old[i] = load_pack<T, V>(at.residual + c);
    w[i] = load_pack<T, V>(weight + c);
  }
  float value[PACKS][V], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PACKS; ++i) {
    const int c = (i * threads + static_cast<int>(threadIdx.x)) * V;
#pragma unroll
    for (int j = 0; j < V; ++j) value[i][j] = to_float(x[i].at[j]);
    if (at.residual) {
      add_rounded(value[i], old[i]);
      if (c < d) store(at.residual + c, value[i]);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) sum += value[i][j] * value[i][j];
  }

  sum = warp_sum(sum);
  if (lane == 0) part[threadIdx.x / kWarp] = sum;
  __syncthreads();
  const float factor = factor_of(warp_sum(lane < threads / kWarp ? part[lane] : 0.0f), p);
#pragma unroll
  for (int i = 0; i < PACKS; ++i) {
    const int c = (i * threads + static_cast<int>(threadIdx.x)) * V;
    if (c < d) store_normalised(at.out + c, value[i], factor, w[i]);
  }
}

template <class T, int V, int PACKS>
void run_held(const RmsNormParams& p, void* stream) {
  const int threads = static_cast<int>(ceil_div(p.d, V * PACKS * kWarp)) * kWarp;
  launch_early(held_row_kernel<T, V, PACKS>, p.outer * p.inner, threads, 0, stream, p, threads);
}

template <class T, int V>
void run(const RmsNormParams& p, void* stream) {
  const int64_t rows = p.outer * p.inner;
  if (p.d <= kWarp * V * 4) {
    launch_early(rms_norm_kernel<T, V, kWarp>, ceil_div(rows, kThreads / kWarp), kThreads, 0, stream, p);
  } else if (V == 1 || p.d > kMostThreads * V * 2) {
    launch_early(rms_norm_kernel<T, V, kThreads>, rows, kThreads, 0, stream, p);
  } else if constexpr (V > 1) {
    p.d <= kGoodThreads* V ? run_held<T, V, 1>(p, stream) : run_held<T, V, 2>(p, stream);
  }
}

template <class T>
bool wide(const RmsNormParams& p) {
  constexpr int V = kVec<T>;
  const bool strides =
      p.d % V == 0 && p.x_outer % V == 0 && p.x_inner % V == 0 && p.res_outer % V == 0 && p.res_inner % V == 0;
  return strides && aligned(p.x) && aligned(p.residual) && aligned(p.weight) && aligned(p.out);
}

}  // namespace
}  // namespace cuda

Status rms_norm_cuda(const RmsNormParams& p, void* stream) {
  if (p.outer * p.inner * p.d == 0) return nullptr;
  cuda::by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = cuda::wide<T>(p) ? cuda::run<T, cuda::kVec<T>> : cuda::run<T, 1>;
    run(p, stream);
  });
  return cuda::launch_status();
}

}  // namespace dyvte
