// Types every kernel header shares. The kernel layer knows no torch and no Python: pointers, sizes, strides, a stream.
#pragma once

#include <cstdint>

namespace dyvte {

enum class DType : int32_t { f32, f16, bf16 };

inline int64_t element_size(DType t) { return t == DType::f32 ? 4 : 2; }

// What a launcher returns: nullptr for success, else a static sentence.
using Status = const char*;

// Runs body(begin, end, ctx) on pieces of [begin, end), each at least `grain` long, possibly on several threads.
// The signature is torch_parallel_for's, so the binding passes torch's own thread pool.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* ctx);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* ctx);

// Largest head size the attention kernels take.
constexpr int64_t kMaxHeadDim = 256;

// K/V pages of all layers. A row is the K (or V) of one token: heads * dim contiguous elements.
struct KvPool {
  void* k;  // [pages, page, heads, dim]
  void* v;
  int64_t pages, page, heads, dim;
};

}  // namespace dyvte
