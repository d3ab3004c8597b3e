#include "common.cuh"
#include "dyvte/kv_compact.h"

namespace dyvte {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 8;  // rows a thread holds in registers between reading and writing

// One block per slot and group of columns; a column is one Unit of a K or V row. A thread moves its own column only,
// from the first kept row to the last, so no two threads touch the same bytes. Row i is read from keep[i] >= i: writing
// up to row i never destroys a row that is still to be read.
template <class Unit>
__global__ void __launch_bounds__(kThreads) kv_compact_kernel(KvCompactParams p, int columns, int groups) {
  __shared__ int64_t from[kThreads], to[kThreads];
  const int slot = blockIdx.x / groups, column = blockIdx.x % groups * kThreads + threadIdx.x;
  const int32_t* keep = p.keep + p.keep_cu[slot];
  const int32_t* table = p.block_table + slot * p.max_pages;
  const int count = p.keep_cu[slot + 1] - p.keep_cu[slot];
  const unsigned page = static_cast<unsigned>(p.pool.page);
  const bool is_k = column < columns;
  Unit* pool = static_cast<Unit*>(is_k ? p.pool.k : p.pool.v) + (is_k ? column : column - columns);

  for (int base = 0; base < count; base += kThreads) {
    __syncthreads();  // the previous offsets are no longer read
    const int mine = base + threadIdx.x;
    if (mine < count) {
      from[threadIdx.x] = pool_row(table, keep[mine], page) * columns;
      to[threadIdx.x] = pool_row(table, mine, page) * columns;
    }
    __syncthreads();
    const int rows = min(kThreads, count - base);
    if (column >= 2 * columns) continue;
    for (int r = 0; r < rows; r += kInFlight) {
      Unit held[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (r + i < rows && from[r + i] != to[r + i]) held[i] = pool[from[r + i]];
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (r + i < rows && from[r + i] != to[r + i]) pool[to[r + i]] = held[i];
      }
    }
  }
  if (column == 0) p.lens[slot] = count;
}

template <class Unit>
void run(const KvCompactParams& p, void* stream) {
  const int columns = static_cast<int>(p.row_bytes / sizeof(Unit));
  const int64_t groups = columns > 0 ? ceil_div(2 * columns, kThreads) : 1;
  launch(kv_compact_kernel<Unit>, p.slots * groups, kThreads, stream, p, columns, static_cast<int>(groups));
}

}  // namespace
}  // namespace cuda

Status kv_compact_cuda(const KvCompactParams& p, void* stream) {
  if (p.slots == 0) return nullptr;
  const uint64_t bits = static_cast<uint64_t>(p.row_bytes) | reinterpret_cast<uintptr_t>(p.pool.k) |
                        reinterpret_cast<uintptr_t>(p.pool.v);
  if (bits % 16 == 0) {
    cuda::run<uint4>(p, stream);
  } else if (bits % 4 == 0) {
    cuda::run<uint32_t>(p, stream);
  } else {
    cuda::run<uint16_t>(p, stream);
  }
  return cuda::launch_status();
}

}  // namespace dyvte
