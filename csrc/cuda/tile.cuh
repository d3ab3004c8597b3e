// Weights that go through tensor cores: 16 rows of them as the 16 x 16 operand of an mma, each lane's part from memory.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

namespace dyvte {
namespace cuda {

constexpr int kStep = 64;  // channels of one step of a warp: 128 bytes of each weight row, in two loads

// One lane's weights of one step: 8 channels of row lane / 4 of both halves of a tile, and 8 that are kStep / 2
// further.
struct Packs {
  uint4 at[2][2];  // [load][half]
};

template <class T>
__device__ __forceinline__ Packs fetch(const T* const (&row)[2], int c, int k) {
  Packs packs = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (c + i * kStep / 2 >= k) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) packs.at[i][half] = load_once(row[half] + c + i * kStep / 2);
  }
  return packs;
}

// An mma wants channels 2t, 2t + 1, 2t + 8 and 2t + 9 from lane t of four. A sum has no order, so we give it four that
// are neighbours, the same ones of the weight and of x.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint4& low, const uint4& high, const uint4& x) {
  mma(sum, {low.x, high.x, low.y, high.y}, {x.x, x.y}, T());
  mma(sum, {low.z, high.z, low.w, high.w}, {x.z, x.w}, T());
}

}  // namespace cuda
}  // namespace dyvte
