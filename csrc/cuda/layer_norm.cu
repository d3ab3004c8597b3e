// A block per row, which it keeps as floats in shared memory: mean and variance are each summed over what is there.
#include <type_traits>

#include "common.cuh"
#include "dyvte/layer_norm.h"
#include "ptx.cuh"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kMostThreads = 512;

// Sum over a block of `threads`, the same in every thread; `part`: of this call alone. All threads must call it.
__device__ __forceinline__ float row_sum(float x, float* part, int threads) {
  const int lane = threadIdx.x % kWarp;
  x = warp_sum(x);
  if (lane == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_sum(lane < threads / kWarp ? part[lane] : 0.0f);
}

template <class T, int V>
__global__ void __launch_bounds__(kMostThreads) layer_norm_kernel(LayerNormParams p, int threads) {
  __shared__ float part[2][kMostThreads / kWarp];
  float* mine = static_cast<float*>(dynamic_shared()) + threadIdx.x;  // every `threads`-th number
  const int d = static_cast<int>(p.d), first = threadIdx.x * V, step = threads * V;
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  for (int c = first; c < d; c += step) {  // what no earlier kernel makes
    prefetch(weight + c);
    prefetch(bias + c);
  }

  wait_for_earlier_kernels();
  const int64_t row = blockIdx.x;
  const T *x = static_cast<const T*>(p.x) + row * p.x_stride, *y = static_cast<const T*>(p.y);
  T *to = static_cast<T*>(p.sum) + row * p.d, *out = static_cast<T*>(p.out) + row * p.d;
  float sum = 0.0f, squares = 0.0f;
  for (int c = first, i = 0; c < d; c += step, i += step) {
    Pack<T, V> pack = load_pack<T, V>(x + c);
    if (y) {
      const Pack<T, V> other = load_pack<T, V>(y + row * p.y_stride + c);
#pragma unroll
      for (int j = 0; j < V; ++j) from_float(to_float(pack.at[j]) + to_float(other.at[j]), &pack.at[j]);
      store_pack(to + c, pack);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      mine[i + j * threads] = to_float(pack.at[j]);
      sum += to_float(pack.at[j]);
    }
  }
  const float mean = row_sum(sum, part[0], threads) / static_cast<float>(d);
  for (int c = first, i = 0; c < d; c += step, i += step) {
#pragma unroll
    for (int j = 0; j < V; ++j) squares += (mine[i + j * threads] - mean) * (mine[i + j * threads] - mean);
  }
  const float factor = 1.0f / sqrtf(row_sum(squares, part[1], threads) / static_cast<float>(d) + p.eps);
  for (int c = first, i = 0; c < d; c += step, i += step) {
    float w[V], b[V], value[V];
    load(weight + c, w);
    load(bias + c, b);
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] = (mine[i + j * threads] - mean) * factor * w[j] + b[j];
    store(out + c, value);
  }
}

template <class T, int V>
void run(const LayerNormParams& p, void* stream) {
  const int64_t most = ceil_div(p.d, V * kWarp) * kWarp, threads = most < kMostThreads ? most : kMostThreads;
  const int64_t shared = ceil_div(p.d, V * threads) * V * threads * static_cast<int64_t>(sizeof(float));
  launch_early(layer_norm_kernel<T, V>, p.rows, static_cast<int>(threads), shared, stream, p,
               static_cast<int>(threads));
}

template <class T>
bool wide(const LayerNormParams& p) {
  constexpr int V = kVec<T>;
  const bool strides = p.d % V == 0 && p.x_stride % V == 0 && p.y_stride % V == 0;
  return strides && aligned(p.x) && aligned(p.y) && aligned(p.weight) && aligned(p.bias) && aligned(p.sum) &&
         aligned(p.out);
}

}  // namespace
}  // namespace cuda

Status layer_norm_cuda(const LayerNormParams& p, void* stream) {
  if (p.rows * p.d == 0) return nullptr;
  cuda::by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = cuda::wide<T>(p) ? cuda::run<T, cuda::kVec<T>> : cuda::run<T, 1>;
    run(p, stream);
  });
  return cuda::launch_status();
}

}  // namespace dyvte
