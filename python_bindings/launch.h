// What a binding needs around a launch: outputs, scratch, torch's threads, the current CUDA stream, tapes.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <memory>
#include <new>
#include <optional>

#include "checks.h"
#include "tape.h"

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
  void* data = nullptr;
  if (recording && !like.on_cuda()) data = recording->take(step * aoti_torch_dtype_element_size(dtype));
  if (data) {
    shim(aoti_torch_create_tensor_from_blob(data, dim, size, stride, 0, dtype, like.device_type, 0, &handle));
  } else {
    shim(aoti_torch_empty_strided(dim, size, stride, dtype, like.device_type, like.device_index, &handle));
  }
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> size, int32_t dtype, const View& like) {
  return empty(size.begin(), static_cast<int64_t>(size.size()), dtype, like);
}

constexpr std::align_val_t kCacheLine{64};
struct FreeHost {
  void operator()(float* p) const { ::operator delete(p, kCacheLine); }
};

// Uninitialised floats on the host, for the length of one kernel call.
inline std::unique_ptr<float, FreeHost> host_scratch(int64_t floats) {
  return std::unique_ptr<float, FreeHost>(
      floats == 0 ? nullptr : static_cast<float*>(::operator new(floats * sizeof(float), kCacheLine)));
}

// The same on the device of `like`. The caching allocator may hand the memory out again at once, but only to work
// behind this op's on the same stream.
class CudaScratch {
 public:
  CudaScratch(int64_t floats, const View& like) {
    if (floats > 0) tensor_ = empty({floats}, aoti_torch_dtype_float32(), like);
  }
  float* data() const { return tensor_ ? static_cast<float*>(tensor_->data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

inline void check_status(const char* op, Status status) {
  if (status) fail(op, ": ", status);
}

// Calls cpu(), and keeps it on the tape that is being recorded. It holds all it needs by value.
template <class Cpu>
void launch_cpu(const char* op, Cpu cpu) {
  check_status(op, cpu());
  if (recording) recording->calls.emplace_back(std::move(cpu));
}

// Calls cpu(), or cuda(stream) with the device of `on` current: whatever asks for the device, as the size of scratch
// may, belongs inside. Without CUDA kernels in this build `cuda`, a generic lambda, is never instantiated.
template <class Cpu, class Cuda>
void dispatch(const View& on, Cpu cpu, const Cuda& cuda) {
  if (!on.on_cuda()) return launch_cpu(on.op, std::move(cpu));
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

#define DYVTE_CPU_WITH_SCRATCH(p, name)                                      \
  [p]() mutable {                                                            \
    const auto scratch = ::dyvte::bind::host_scratch(name##_cpu_scratch(p)); \
    p.scratch = scratch.get();                                               \
    return ::dyvte::name##_cpu(p, torch_parallel_for);                       \
  }

// Runs kernel `name` with parameters p where the tensor `on` is.
#define DYVTE_LAUNCH(on, p, name)                                     \
  ::dyvte::bind::dispatch(                                            \
      on, [p] { return ::dyvte::name##_cpu(p, torch_parallel_for); }, \
      [&](auto* stream) { return ::dyvte::name##_cuda(p, stream); })

// The same for a kernel that works in p.scratch; `cpu` is what a CPU runs.
#define DYVTE_LAUNCH_WITH_SCRATCH(on, p, name, cpu)                       \
  ::dyvte::bind::dispatch(on, cpu, [&](auto* stream) {                    \
    const ::dyvte::bind::CudaScratch scratch(name##_cuda_scratch(p), on); \
    p.scratch = scratch.data();                                           \
    return ::dyvte::name##_cuda(p, stream);                               \
  })
