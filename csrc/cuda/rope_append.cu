#include <type_traits>

#include "common.cuh"
#include "dyvte/rope_append.h"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// Where one packed row goes and which angles it gets.
struct Row {
  const float* cos;  // followed by the sines, rot_dim / 2 floats on
  int64_t at;        // element offset of the row in the pools
};

__device__ Row find_row(const RopeAppendParams& p, int row) {
  const int seq = find_sequence(p.cu_seqlens, static_cast<int>(p.batch), row);
  const unsigned at = p.lens[seq] + (row - p.cu_seqlens[seq]);
  const int64_t slot = pool_row(p.block_table + seq * p.table_stride, at, static_cast<unsigned>(p.pool.page));
  return {p.cos_sin + p.positions[row] * p.rot_dim, slot * p.pool.heads * p.pool.dim};
}

// Rotates the pair of packs at x[c] and x[half + c] in place, and copies both to `cache` if there is one.
template <class T, int V>
__device__ void rotate(T* x, T* cache, const float* cos, int c, int half) {
  float a[V], b[V], cs[V], sn[V], low[V], high[V];
  load(x + c, a);
  load(x + half + c, b);
  load(cos + c, cs);
  load(cos + half + c, sn);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    low[i] = turned(a[i], b[i], cs[i], -sn[i]);
    high[i] = turned(b[i], a[i], cs[i], sn[i]);
  }
  store(x + c, low);
  store(x + half + c, high);
  if (cache == nullptr) return;
  store(cache + c, low);
  store(cache + half + c, high);
}

template <class T, int V>
__device__ void copy(T* to, const T* from) {
  store_pack(to, load_pack<T, V>(from));
}

// One block row per packed row. Units of work, in this order: rotated pairs of q, rotated pairs of k, unrotated
// channels of k, v.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(RopeAppendParams p) {
  const int row = blockIdx.x;
  const Row to = find_row(p, row);
  const int half = static_cast<int>(p.rot_dim / 2), dim = static_cast<int>(p.pool.dim),
            heads = static_cast<int>(p.pool.heads);
  const int pairs = half / V, rest = (dim - 2 * half) / V, packs = dim / V;
  const int q_units = static_cast<int>(p.heads_q) * pairs, k_units = heads * pairs, rest_units = heads * rest;
  const int units = q_units + k_units + rest_units + heads * packs;
  T* q = static_cast<T*>(p.q) + row * p.q_stride;
  T* k = static_cast<T*>(p.k) + row * p.k_stride;
  const T* v = static_cast<const T*>(p.v) + row * p.v_stride;
  T* k_cache = static_cast<T*>(p.pool.k) + to.at;
  T* v_cache = static_cast<T*>(p.pool.v) + to.at;
  for (int unit = blockIdx.y * kThreads + threadIdx.x; unit < units; unit += gridDim.y * kThreads) {
    int u = unit;
    if (u < q_units) {
      rotate<T, V>(q + u / pairs * dim, nullptr, to.cos, u % pairs * V, half);
      continue;
    }
    u -= q_units;
    if (u < k_units) {
      rotate<T, V>(k + u / pairs * dim, k_cache + u / pairs * dim, to.cos, u % pairs * V, half);
      continue;
    }
    u -= k_units;
    if (u < rest_units) {
      const int c = u / rest * dim + 2 * half + u % rest * V;
      copy<T, V>(k_cache + c, k + c);
      continue;
    }
    u -= rest_units;
    copy<T, V>(v_cache + u * V, v + u * V);
  }
}

template <class T, int V>
void run(const RopeAppendParams& p, void* stream) {
  const int64_t half = p.rot_dim / 2, dim = p.pool.dim;
  const int64_t units = (p.heads_q + p.pool.heads) * (half / V) + p.pool.heads * ((dim - 2 * half) / V + dim / V);
  if (units == 0) return;
  int64_t pieces = ceil_div(units, kThreads);
  pieces = pieces < 1024 ? pieces : 1024;
  launch(rope_append_kernel<T, V>, Grid(p.rows, pieces), kThreads, stream, p);
}

template <class T>
bool wide(const RopeAppendParams& p) {
  constexpr int V = kVec<T>;
  const bool sizes = p.rot_dim / 2 % V == 0 && p.pool.dim % V == 0;
  const bool strides = p.q_stride % V == 0 && p.k_stride % V == 0 && p.v_stride % V == 0;
  return sizes && strides && aligned(p.q) && aligned(p.k) && aligned(p.v) && aligned(p.cos_sin) && aligned(p.pool.k) &&
         aligned(p.pool.v);
}

}  // namespace
}  // namespace cuda

Status rope_append_cuda(const RopeAppendParams& p, void* stream) {
  if (p.rows == 0 || p.batch == 0) return nullptr;
  cuda::by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = cuda::wide<T>(p) ? cuda::run<T, cuda::kVec<T>> : cuda::run<T, 1>;
    run(p, stream);
  });
  return cuda::launch_status();
}

}  // namespace dyvte
