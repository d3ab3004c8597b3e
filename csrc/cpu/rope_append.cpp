#include "dyvte/rope_append.h"

#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

template <class T>
void rotate_head(T* x, const float* cos, const float* sin, int64_t half) {
  T* y = x + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load(x + i), b = load(y + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(y + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(y[i]);
    from_float(a * cos[i] - b * sin[i], x + i);
    from_float(b * cos[i] + a * sin[i], y + i);
  }
}

template <class T>
void append_row(const RopeAppendParams& p, int64_t row, int64_t seq) {
  const int64_t half = p.rot_dim / 2, kv_row = p.pool.heads * p.pool.dim;
  const float* cos = p.cos_sin + p.positions[row] * p.rot_dim;
  T* q = static_cast<T*>(p.q) + row * p.q_stride;
  T* k = static_cast<T*>(p.k) + row * p.k_stride;
  for (int64_t h = 0; h < p.heads_q; ++h) rotate_head(q + h * p.pool.dim, cos, cos + half, half);
  for (int64_t h = 0; h < p.pool.heads; ++h) rotate_head(k + h * p.pool.dim, cos, cos + half, half);
  const int64_t at = p.lens[seq] + (row - p.cu_seqlens[seq]);
  const int64_t page = p.block_table[seq * p.table_stride + at / p.pool.page];
  const int64_t slot = (page * p.pool.page + at % p.pool.page) * kv_row;
  std::memcpy(static_cast<T*>(p.pool.k) + slot, k, kv_row * sizeof(T));
  std::memcpy(static_cast<T*>(p.pool.v) + slot, static_cast<const T*>(p.v) + row * p.v_stride, kv_row * sizeof(T));
}

}  // namespace

Status rope_append_cpu(const RopeAppendParams& p, ParallelFor parallel_for) {
  by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t row_work = (p.heads_q + 2 * p.pool.heads) * p.pool.dim;
    parallel(parallel_for, p.rows, max64(1, 65536 / max64(1, row_work)), [&](int64_t begin, int64_t end) {
      int64_t seq = 0;
      for (int64_t row = begin; row < end; ++row) {
        while (row >= p.cu_seqlens[seq + 1]) ++seq;
        append_row<T>(p, row, seq);
      }
    });
  });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
