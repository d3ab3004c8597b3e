// The products of a decoding step with what a layer does before and after them, each in one kernel: up to kDecodeRows
// rows, one of each sequence. They are bound by reading the weights, once, as they lie in memory. CUDA only.
#pragma once

#include "dyvte/common.h"

namespace dyvte {

constexpr int64_t kDecodeRows = 8;

// x times the weight transposed, plus the bias. With `norm` x is RMS-normalised first, in Llama's rounding. All
// addresses are 16-byte aligned, k and the strides multiples of 8.
struct DecodeProduct {
  const void* x;       // [rows, k], row stride x_stride
  const void* norm;    // [k], or null
  const void* weight;  // [n, k], row stride weight_stride
  const void* bias;    // [n], or null
  int64_t rows, n, k, x_stride, weight_stride;
  float eps;
  DType dtype;  // f16 or bf16
};

// out = silu(gate) * up, where gate is the first half of the product's columns.
struct NormGateUpParams {
  DecodeProduct product;
  void* out;  // [rows, n / 2]
};

// residual += product.
struct AddLinearParams {
  DecodeProduct product;
  void* residual;  // [rows, n], row stride residual_stride
  int64_t residual_stride;
};

// out = product, unrounded: logits.
struct NormLinearParams {
  DecodeProduct product;
  float* out;  // [rows, n]
};

// The product is q | k | v, heads of pool.dim columns. q and k are rotated (rotate-half, all channels), q is returned,
// k and v are written behind each sequence's cached rows. pool.dim is a multiple of 16.
struct NormQkvAppendParams {
  DecodeProduct product;
  void* q;                     // [rows, heads_q, pool.dim]
  const float* cos_sin;        // [max_pos, pool.dim]: cos half | sin half
  const int32_t* positions;    // [rows]
  const int32_t* block_table;  // [rows, max_pages], row stride table_stride
  const int32_t* lens;         // [rows]
  KvPool pool;
  int64_t heads_q, max_pages, table_stride;
};

Status norm_gate_up_cuda(const NormGateUpParams& p, void* stream);
Status add_linear_cuda(const AddLinearParams& p, void* stream);
Status norm_linear_cuda(const NormLinearParams& p, void* stream);
Status norm_qkv_append_cuda(const NormQkvAppendParams& p, void* stream);

}  // namespace dyvte
