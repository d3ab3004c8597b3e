// Enough of CUDA to run the kernels of csrc/cuda on the CPU, where sanitisers can watch them and no GPU is needed.
// Blocks run one after the other in a random order; the threads of a block are fibers, and which one runs next is
// random at every barrier and shuffle, with one warp far behind the others, so a missing __syncthreads() shows as a
// wrong result. Shared memory is a static array. Not modelled: memory ordering between blocks, kernels that overlap,
// coalescing, register and shared memory limits, misaligned-access faults (the undefined-behaviour sanitiser reports
// those).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

extern uint3 threadIdx, blockIdx;
extern dim3 gridDim;

namespace emulate {

// Runs `thread` once per thread of the grid. What a block finds in its `shared_bytes` at first is no number.
void run_grid(dim3 blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread);
void block_barrier();
// The value that lane `source` of this warp passed to the same call.
float exchange(float value, unsigned source);
// Six registers of every lane of this warp.
const unsigned (*gather(const unsigned (&mine)[6]))[6];
unsigned lane();
void* dynamic_shared();
void check_global(const void* at);  // dies where it is in shared memory
inline void wait_for_earlier_kernels() {}
inline void let_next_begin() {}

}  // namespace emulate

inline void __syncthreads() { emulate::block_barrier(); }
inline void __threadfence() {}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return emulate::exchange(value, emulate::lane() ^ mask);
}
inline float __shfl_down_sync(unsigned, float value, int delta) {
  const unsigned source = emulate::lane() + delta;
  return emulate::exchange(value, source < 32 ? source : emulate::lane());
}
inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned old = *at;
  *at = old >= most ? 0 : old + 1;
  return old;
}
template <class T>
T __ldcg(const T* at) {
  emulate::check_global(at);
  return *at;
}
inline void __stwb(uint4* at, uint4 value) {
  emulate::check_global(at);
  *at = value;
}

namespace emulate {

// mma.m16n8k16: a[16][16] times b[16][8], spread over the lanes as PTX says. T: two of them are in each register.
template <class T>
void mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], T) {
  float of_a[32][8], of_b[32][4];  // every lane's
  const unsigned (*all)[6] = gather({a[0], a[1], a[2], a[3], b[0], b[1]});
  for (unsigned source = 0; source < 32; ++source) {
    T pairs[12];
    std::memcpy(pairs, all[source], sizeof(pairs));
    for (unsigned i = 0; i < 12; ++i) (i < 8 ? of_a[source][i] : of_b[source][i - 8]) = number(pairs[i]);
  }
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      // Register k / 8 of the row's half (a: 2 of them for each half) and of b, in lane k % 8 / 2 of the quad.
      const float x = of_a[row % 8 * 4 + k % 8 / 2][(k / 8 * 2 + row / 8) * 2 + k % 2];
      sum[i] += x * of_b[column * 4 + k % 8 / 2][k / 8 * 2 + k % 2];
    }
  }
}

}  // namespace emulate

// --- runtime API ---------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaFuncAttributes {
  int ptxVersion, maxDynamicSharedSizeBytes;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t);
void emulate_launch_error(cudaError_t error);

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {90, 48 << 10};
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 grid = config->gridDim;
  const bool valid = grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 65535 && grid.z > 0 &&
                     grid.z <= 65535 && config->blockDim.x > 0 && config->blockDim.x <= 1024;
  if (!valid) {
    emulate_launch_error(cudaErrorInvalidConfiguration);
    return cudaErrorInvalidConfiguration;
  }
  emulate::run_grid(grid, config->blockDim.x, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
