// What CUDA's C++ has no function for: tensor cores on single registers, loads that pass by the first-level cache,
// memory whose size the launch decides, kernels that begin before the one before them has ended. The emulator has its
// own forms.
#pragma once

#include "common.cuh"

namespace dyvte {
namespace cuda {

#ifdef __CUDACC__

// 16 bytes that this block reads once. Volatile, and not `.nc`: such loads ptxas moves behind the wait for earlier
// kernels.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

// Begins to bring the line of `at` into the second-level cache.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" : : "l"(at)); }

// sum += a b of 16 x 16 and 16 x 8 numbers, as mma.m16n8k16 spreads them over a warp.
__device__ __forceinline__ void mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A block's memory of the size given to `launch_early`, 16-byte aligned.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ uint4 dyvte_dynamic_shared[];
  return dyvte_dynamic_shared;
}

// Returns when all kernels before this one on the stream have ended, and what they wrote can be read. Until then a
// kernel of `launch_early` may neither read what kernels write nor write anything.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The next kernel of `launch_early` may begin where there is room. After the wait, so that only one begins early.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

#else

using emulate::dynamic_shared;
using emulate::let_next_begin;
using emulate::mma;
using emulate::wait_for_earlier_kernels;
inline uint4 load_once(const void* from) { return *static_cast<const uint4*>(from); }
inline void prefetch(const void* at) { (void)*static_cast<const char*>(at); }

#endif

// Launches a kernel that calls `wait_for_earlier_kernels` in all threads. Where its code is for a GPU that can (code
// for older ones, which has no such wait, also runs on newer ones), it begins before its predecessor has ended.
template <class... Parameters, class... Arguments>
inline void launch_early(void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared_bytes, void* stream,
                         const Arguments&... arguments) {
  cudaFuncAttributes code{};
  if (cudaFuncGetAttributes(&code, kernel) != cudaSuccess) return;
  if (shared_bytes > code.maxDynamicSharedSizeBytes) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared_bytes)) != cudaSuccess) return;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks();
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);  // launch_status() reports what any of these returned
}

}  // namespace cuda
}  // namespace dyvte
