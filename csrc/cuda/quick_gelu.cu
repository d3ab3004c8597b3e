#include <type_traits>

#include "common.cuh"
#include "dyvte/quick_gelu.h"
#include "ptx.cuh"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) quick_gelu_kernel(QuickGeluParams p) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  wait_for_earlier_kernels();
  if (at >= p.n) return;
  T* x = static_cast<T*>(p.x) + at;
  float value[V];
  load(x, value);
#pragma unroll
  for (int i = 0; i < V; ++i) value[i] /= 1.0f + expf(-1.702f * value[i]);
  store(x, value);
}

template <class T, int V>
void run(const QuickGeluParams& p, void* stream) {
  launch_early(quick_gelu_kernel<T, V>, ceil_div(p.n, kThreads * V), kThreads, 0, stream, p);
}

}  // namespace
}  // namespace cuda

Status quick_gelu_cuda(const QuickGeluParams& p, void* stream) {
  if (p.n == 0) return nullptr;
  cuda::by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int V = cuda::kVec<T>;
    p.n % V == 0 && cuda::aligned(p.x) ? cuda::run<T, V>(p, stream) : cuda::run<T, 1>(p, stream);
  });
  return cuda::launch_status();
}

}  // namespace dyvte
