#include <type_traits>

#include "common.cuh"
#include "dyvte/silu_mul.h"
#include "ptx.cuh"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Block (row, piece): one pack of V columns per thread and step.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(SiluMulParams p) {
  wait_for_earlier_kernels();
  const T* gate = static_cast<const T*>(p.gate_up) + blockIdx.x * p.stride;
  T* out = static_cast<T*>(p.out) + blockIdx.x * p.m;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads * V;
  for (int64_t c = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * V; c < p.m; c += step) {
    float g[V], u[V];
    load(gate + c, g);
    load(gate + p.m + c, u);
#pragma unroll
    for (int i = 0; i < V; ++i) u[i] *= g[i] / (1.0f + expf(-g[i]));
    store(out + c, u);
  }
}

template <class T, int V>
void run(const SiluMulParams& p, void* stream) {
  int64_t pieces = ceil_div(p.m, kThreads * V);
  pieces = pieces < 1024 ? pieces : 1024;
  launch_early(silu_mul_kernel<T, V>, Grid(p.rows, pieces), kThreads, 0, stream, p);
}

}  // namespace
}  // namespace cuda

Status silu_mul_cuda(const SiluMulParams& p, void* stream) {
  if (p.rows * p.m == 0) return nullptr;
  cuda::by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int V = cuda::kVec<T>;
    const bool wide = p.m % V == 0 && p.stride % V == 0 && cuda::aligned(p.gate_up) && cuda::aligned(p.out);
    wide ? cuda::run<T, V>(p, stream) : cuda::run<T, 1>(p, stream);
  });
  return cuda::launch_status();
}

}  // namespace dyvte
