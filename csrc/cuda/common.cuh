// Shared by all CUDA kernels: conversions, 16-byte accesses, reductions in a fixed order, launch status.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "dyvte/common.h"

namespace dyvte {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_float(float x, float* to) { *to = x; }
__device__ __forceinline__ void from_float(float x, __half* to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// N elements, moved in 16-byte accesses, or a single element. Stores use __stwb, since nvcc splits some plain uint4
// stores; so they are for global memory alone.
template <class T, int N>
struct Pack {
  static_assert(N == 1 || sizeof(T) * N % 16 == 0, "a pack is one element or a multiple of 16 bytes");
  T at[N];
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  Pack<T, N> pack;
  if constexpr (N == 1) {
    pack.at[0] = *from;
  } else {
    uint4 raw[sizeof(pack) / 16];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) raw[i] = reinterpret_cast<const uint4*>(from)[i];
    memcpy(&pack, raw, sizeof(pack));
  }
  return pack;
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
  if constexpr (N == 1) {
    *to = pack.at[0];
  } else {
    uint4 raw[sizeof(pack) / 16];
    memcpy(raw, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) __stwb(reinterpret_cast<uint4*>(to) + i, raw[i]);
  }
}

template <class T, int N>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  const Pack<T, N> pack = load_pack<T, N>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.at[i]);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) from_float(from[i], &pack.at[i]);
  store_pack(to, pack);
}

// Elements of one 16-byte access.
template <class T>
constexpr int kVec = 16 / sizeof(T);

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Sum over a block of THREADS threads, the same in every thread. All threads must call it.
template <int THREADS>
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float part[THREADS / kWarp];
  x = warp_sum(x);
  __syncthreads();  // an earlier call's reads are over
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < THREADS / kWarp; ++i) sum += part[i];
  return sum;
}

// The sequence a packed row belongs to: the last one that begins at or before it.
__device__ __forceinline__ int find_sequence(const int32_t* cu, int batch, int row) {
  int low = 0, high = batch;  // cu[low] <= row < cu[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Number of cache row `row` of a sequence among all rows of the pool.
__device__ __forceinline__ int64_t pool_row(const int32_t* table, unsigned row, unsigned page) {
  return static_cast<int64_t>(table[row / page]) * page + row % page;
}

// True in exactly one of the `blocks` blocks that count in `arrived`: the last, which may read, by __ldcg, what all of
// them had written before. All threads must call it. `arrived` is 0 at first, and again afterwards. One thread fences
// for its block, between barriers, as cooperative groups do.
__device__ __forceinline__ bool last_to_arrive(unsigned* arrived, unsigned blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(arrived, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Channel `x` turned together with `other`, half the rotated channels away: sin is negative for the first half. With an
// fmaf, so that all kernels round it alike.
__device__ __forceinline__ float turned(float x, float other, float cos, float sin) {
  return fmaf(x, cos, other * sin);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}

// Blocks of a launch. A count beyond 32 bits becomes one that CUDA refuses, where a conversion would drop the high
// bits.
struct Grid {
  int64_t x, y;
  Grid(int64_t x_, int64_t y_ = 1) : x(x_), y(y_) {}
  dim3 blocks() const { return dim3(clipped(x), clipped(y)); }

 private:
  static unsigned clipped(int64_t n) { return n < UINT32_MAX ? static_cast<unsigned>(n) : UINT32_MAX; }
};

template <class... Parameters, class... Arguments>
inline void launch(void (*kernel)(Parameters...), Grid grid, int threads, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks();
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, kernel, arguments...);  // launch_status() reports what it returns
}

inline Status launch_status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls f with a null pointer of the element type.
template <class F>
inline void by_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) f(static_cast<float*>(nullptr));
  if (dtype == DType::f16) f(static_cast<__half*>(nullptr));
  if (dtype == DType::bf16) f(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace cuda
}  // namespace dyvte
