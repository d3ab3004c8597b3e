// What a binding needs around a launch: outputs, scratch, torch's threads, the current CUDA stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <memory>
#include <new>
#include <optional>

#include "checks.h"

// Missing from CPU builds of torch, so weak; only reached with CUDA tensors.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace dyvte::bind {

constexpr int64_t kMaxDims = 8;

inline Tensor empty(const int64_t* size, int64_t dim, int32_t dtype, const View& like) {
  int64_t stride[kMaxDims], step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    stride[i] = step;
    step *= size[i] > 0 ? size[i] : 1;
  }
  AtenTensorHandle handle;
  shim(aoti_torch_empty_strided(dim, size, stride, dtype, like.device_type, like.device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> size, int32_t dtype, const View& like) {
  return empty(size.begin(), static_cast<int64_t>(size.size()), dtype, like);
}

// Uninitialised floats where `like` lives, for the length of one op call. On CUDA the caching allocator may hand the
// memory out again at once, but only to work behind this op's on the same stream.
class Scratch {
 public:
  Scratch(int64_t floats, const View& like) {
    if (floats == 0) return;
    if (like.on_cuda()) {
      tensor_ = empty({floats}, aoti_torch_dtype_float32(), like);
      data_ = static_cast<float*>(tensor_->data_ptr());
    } else {
      host_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kCacheLine)));
      data_ = host_.get();
    }
  }
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kCacheLine); }
  };
  std::unique_ptr<float, Free> host_;
  std::optional<Tensor> tensor_;
  float* data_ = nullptr;
};

inline void check_status(const char* op, Status status) {
  if (status) fail(op, ": ", status);
}

// Calls cpu(), or cuda(stream) with the device of `on` current: whatever asks for the device, as the size of scratch
// may, belongs inside. Without CUDA kernels in this build `cuda`, a generic lambda, is never instantiated.
template <class Cpu, class Cuda>
void dispatch(const View& on, const Cpu& cpu, const Cuda& cuda) {
  if (!on.on_cuda()) return check_status(on.op, cpu());
#ifdef DYVTE_WITH_CUDA
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream) fail(on.op, ": ", on.name, " is on CUDA, but this torch is a CPU build");
  const torch::stable::accelerator::DeviceGuard guard(on.device_index);
  shim(aoti_torch_get_current_cuda_stream(on.device_index, &stream));
  check_status(on.op, cuda(stream));
#else
  (void)cuda;
  fail(on.op, ": ", on.name, " is on CUDA, but this build has no CUDA kernels; rebuild with DYVTE_CUDA=ON");
#endif
}

}  // namespace dyvte::bind

// Runs kernel `name` with parameters p where the tensor `on` is.
#define DYVTE_LAUNCH(on, p, name)                                     \
  ::dyvte::bind::dispatch(                                            \
      on, [&] { return ::dyvte::name##_cpu(p, torch_parallel_for); }, \
      [&](auto* stream) { return ::dyvte::name##_cuda(p, stream); })

// The same for a kernel that works in p.scratch.
#define DYVTE_LAUNCH_WITH_SCRATCH(on, p, name)                            \
  ::dyvte::bind::dispatch(                                                \
      on,                                                                 \
      [&] {                                                               \
        const ::dyvte::bind::Scratch scratch(name##_cpu_scratch(p), on);  \
        p.scratch = scratch.data();                                       \
        return ::dyvte::name##_cpu(p, torch_parallel_for);                \
      },                                                                  \
      [&](auto* stream) {                                                 \
        const ::dyvte::bind::Scratch scratch(name##_cuda_scratch(p), on); \
        p.scratch = scratch.data();                                       \
        return ::dyvte::name##_cuda(p, stream);                           \
      })
