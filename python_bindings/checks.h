// Argument checks of torch.ops.dyvte.*. A failed check throws std::runtime_error (RuntimeError in Python) whose message
// names the argument, what is accepted and what was given.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dyvte/common.h"

namespace dyvte::bind {

using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "dyvte::";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void shim(AOTITorchError error) {
  if (error != TORCH_SUCCESS) throw std::runtime_error("dyvte: a call into torch failed");
}

// An argument's metadata, read once.
struct View {
  const char* op;
  const char* name;
  void* data;
  int64_t dim;
  int64_t* size;
  int64_t* stride;
  int32_t dtype, device_type, device_index;

  View(const char* op_, const char* name_, const Tensor& t) : op(op_), name(name_) {
    shim(aoti_torch_get_dim(t.get(), &dim));
    shim(aoti_torch_get_sizes(t.get(), &size));
    shim(aoti_torch_get_strides(t.get(), &stride));
    shim(aoti_torch_get_dtype(t.get(), &dtype));
    shim(aoti_torch_get_device_type(t.get(), &device_type));
    shim(aoti_torch_get_device_index(t.get(), &device_index));
    shim(aoti_torch_get_data_ptr(t.get(), &data));
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  bool on_cuda() const { return device_type == aoti_torch_device_type_cuda(); }

  std::string shape() const {
    std::ostringstream s;
    for (int64_t i = 0; i < dim; ++i) s << (i ? ", " : "[") << size[i];
    return (dim ? s.str() : "[") + "]";
  }

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim; ++i) n *= size[i];
    return n;
  }

  // Dense in all dimensions from `first` on.
  bool dense_from(int64_t first) const {
    int64_t expected = 1;
    if (numel() == 0) return true;
    for (int64_t i = dim - 1; i >= first; --i) {
      if (size[i] != 1 && stride[i] != expected) return false;
      expected *= size[i];
    }
    return true;
  }

  // Elements between neighbouring rows. The stride of a dimension of one row is arbitrary and never used.
  int64_t row_stride() const { return stride[0]; }
};

inline const char* dtype_name(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_float16()) return "float16";
  if (dtype == aoti_torch_dtype_bfloat16()) return "bfloat16";
  if (dtype == aoti_torch_dtype_int32()) return "int32";
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  return "another dtype";
}

// `want`: -1 accepts any size. `meaning` names the dimensions, e.g. "[N, Hq, D]".
inline void check_shape(const View& v, std::initializer_list<int64_t> want, const char* meaning) {
  bool ok = v.dim == static_cast<int64_t>(want.size());
  int64_t i = 0;
  for (int64_t w : want) {
    ok = ok && (w < 0 || v.size[i] == w);
    ++i;
  }
  if (ok) return;
  std::ostringstream expected;
  i = 0;
  for (int64_t w : want) expected << (i++ ? ", " : "[") << (w < 0 ? std::string("any") : std::to_string(w));
  fail(v.op, ": ", v.name, " must have shape ", meaning, " = ", expected.str(), "], got ", v.shape());
}

inline void check_dense(const View& v, int64_t first = 0) {
  if (v.dense_from(first)) return;
  fail(v.op, ": ", v.name, " must be contiguous", first ? " within each row (only the row stride is free)" : "",
       ", got shape ", v.shape());
}

inline void check_int32(const View& v) {
  if (v.dtype != aoti_torch_dtype_int32()) fail(v.op, ": ", v.name, " must be int32, got ", dtype_name(v.dtype));
}

inline void check_float32(const View& v) {
  if (v.dtype != aoti_torch_dtype_float32()) fail(v.op, ": ", v.name, " must be float32, got ", dtype_name(v.dtype));
}

inline DType data_type(const View& v) {
  if (v.dtype == aoti_torch_dtype_bfloat16()) return DType::bf16;
  if (v.dtype == aoti_torch_dtype_float32()) return DType::f32;
  if (v.dtype == aoti_torch_dtype_float16()) return DType::f16;
  fail(v.op, ": ", v.name, " must be float32, float16 or bfloat16, got ", dtype_name(v.dtype));
}

inline void check_like(const View& v, const View& first) {
  if (v.dtype == first.dtype) return;
  fail(v.op, ": ", v.name, " must have the dtype of ", first.name, " (", dtype_name(first.dtype), "), got ",
       dtype_name(v.dtype));
}

inline void check_device(const View& first, std::initializer_list<const View*> others) {
  for (const View* v : others) {
    if (v->device_type == first.device_type && v->device_index == first.device_index) continue;
    fail(v->op, ": ", v->name, " must be on the device of ", first.name);
  }
}

// An int32 index array: dense, of the given shape.
inline void check_index(const View& v, std::initializer_list<int64_t> want, const char* meaning) {
  check_int32(v);
  check_shape(v, want, meaning);
  check_dense(v);
}

// Where each of B sequences begins, and the end: int32 [B + 1]. Returns B.
inline int64_t check_offsets(const View& v) {
  check_index(v, {-1}, "[B + 1]");
  if (v.size[0] == 0) fail(v.op, ": ", v.name, " must have shape [B + 1], got [0]");
  return v.size[0] - 1;
}

// --- values of index arrays, CPU only: reading them on a CUDA device would wait for it -------------------------------

inline void check_value(const View& v, int64_t at, int64_t low, int64_t high) {
  const int64_t value = v.as<int32_t>()[at];
  if (value >= low && value <= high) return;
  fail(v.op, ": ", v.name, "[", at, "] must be in ", low, "..", high, ", got ", value);
}

// Cumulative lengths: starts at 0, never falls, ends at `total`.
inline void check_cumulative(const View& v, int64_t total) {
  const int64_t last = v.numel() - 1;
  check_value(v, 0, 0, 0);
  for (int64_t i = 1; i <= last; ++i) check_value(v, i, v.as<int32_t>()[i - 1], total);
  check_value(v, last, total, total);
}

// Table entries of rows [begin, end) of one slot whose entries start at element `at`.
inline void check_pages(const View& table, int64_t at, int64_t begin, int64_t end, const KvPool& pool) {
  for (int64_t i = begin / pool.page; i * pool.page < end; ++i) check_value(table, at + i, 0, pool.pages - 1);
}

}  // namespace dyvte::bind
