#include <type_traits>

#include "common.cuh"
#include "dyvte/rms_norm.h"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// GROUP threads per row: a warp for short rows (heads), a block for hidden states.
template <class T, int V, int GROUP>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormParams p) {
  const unsigned row = blockIdx.x * (kThreads / GROUP) + threadIdx.x / GROUP;
  if (row >= p.outer * p.inner) return;  // whole warps; never within a block that synchronises
  const unsigned inner = static_cast<unsigned>(p.inner), o = row / inner, i = row % inner;
  const int64_t first = threadIdx.x % GROUP * V;
  const T* x = static_cast<const T*>(p.x) + o * p.x_outer + i * p.x_inner;
  T* residual = p.residual ? static_cast<T*>(p.residual) + o * p.res_outer + i * p.res_inner : nullptr;

  float sum = 0.0f;
  for (int64_t c = first; c < p.d; c += GROUP * V) {
    float value[V];
    load(x + c, value);
    if (residual) {
      float old[V];
      load(residual + c, old);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        T rounded;
        from_float(value[j] + old[j], &rounded);
        value[j] = to_float(rounded);
      }
      store(residual + c, value);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) sum += value[j] * value[j];
  }
  sum = GROUP == kWarp ? warp_sum(sum) : block_sum<kThreads>(sum);
  const float factor = 1.0f / sqrtf(sum / static_cast<float>(p.d) + p.eps);

  const T* from = residual ? residual : x;  // each thread reads back what it wrote itself
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * p.d;
  for (int64_t c = first; c < p.d; c += GROUP * V) {
    float value[V], w[V];
    load(from + c, value);
    load(weight + c, w);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T rounded;
      from_float(value[j] * factor, &rounded);
      value[j] = to_float(rounded) * w[j];
    }
    store(out + c, value);
  }
}

template <class T, int V>
void run(const RmsNormParams& p, void* stream) {
  const int64_t rows = p.outer * p.inner;
  if (p.d <= kWarp * V * 4) {
    launch(rms_norm_kernel<T, V, kWarp>, ceil_div(rows, kThreads / kWarp), kThreads, stream, p);
  } else {
    launch(rms_norm_kernel<T, V, kThreads>, rows, kThreads, stream, p);
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
