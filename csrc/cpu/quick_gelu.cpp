#include "dyvte/quick_gelu.h"

#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

Vec quick_gelu(Vec x) { return x / (1.0f + exp(-1.702f * x)); }

template <class T>
void quick_gelu_run(T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, quick_gelu(load(x + i)));
  for (; i < n; ++i) from_float(quick_gelu(splat(to_float(x[i])))[0], x + i);
}

}  // namespace

Status quick_gelu_cpu(const QuickGeluParams& p, ParallelFor parallel_for) {
  by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel(parallel_for, p.n, 65536,
             [&](int64_t begin, int64_t end) { quick_gelu_run(static_cast<T*>(p.x) + begin, end - begin); });
  });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
