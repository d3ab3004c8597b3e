#include "dyvte/silu_mul.h"

#include "simd.h"

namespace dyvte {
namespace DYVTE_ISA {
namespace {

template <class T>
void silu_mul_row(const T* gate, const T* up, T* out, int64_t m) {
  int64_t i = 0;
  for (; i + kLanes <= m; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
  for (; i < m; ++i) from_float(silu(splat(to_float(gate[i])))[0] * to_float(up[i]), out + i);
}

}  // namespace

Status silu_mul_cpu(const SiluMulParams& p, ParallelFor parallel_for) {
  by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kPiece = 4096;  // columns of one task
    const int64_t pieces = (p.m + kPiece - 1) / kPiece;
    parallel(parallel_for, p.rows * pieces, max64(1, 65536 / max64(1, min64(p.m, kPiece))),
             [&](int64_t begin, int64_t end) {
               for (int64_t task = begin; task < end; ++task) {
                 const int64_t row = task / pieces, first = task % pieces * kPiece;
                 const T* gate = static_cast<const T*>(p.gate_up) + row * p.stride + first;
                 silu_mul_row(gate, gate + p.m, static_cast<T*>(p.out) + row * p.m + first, min64(kPiece, p.m - first));
               }
             });
  });
  return nullptr;
}

}  // namespace DYVTE_ISA
}  // namespace dyvte
