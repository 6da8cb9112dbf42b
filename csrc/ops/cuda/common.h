// Shared by the launchers for CUDA: outputs, streams, errors, and registration. Tests compile the same files against an
// emulation of the device (DK_EMULATED), with tensors on the CPU.
#pragma once
#include <vector>

#include "ops/common.h"

#if defined(DK_EMULATED)
#include "cuda/device.h"

#define DK_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(dalle_kernels_emulated, CPU, m)

namespace dk {

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};
inline void* current_stream(const Tensor&) { return nullptr; }
inline Tensor visible(Tensor t) {   // to kernels
  if (t.numel()) emulation::allow(t.data_ptr(), t.numel() * t.element_size());
  return t;
}
inline Tensor prepared(Tensor t) {   // poisoned, so that unwritten elements are detected
  if (t.numel()) std::memset(t.data_ptr(), 0xff, t.numel() * t.element_size());
  return visible(t);
}

}   // namespace dk

#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#define DK_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(dalle_kernels, CUDA, m)

namespace dk {

// Makes the tensor's device current for the lifetime of the guard.
struct OnDevice {
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

// torch's current stream. The symbol is in libtorch_cuda, which a CPU build of torch lacks; it is looked up on first
// use, so that this library loads with a CPU build too.
inline void* current_stream(const Tensor& t) {
  using Lookup = int32_t (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(lookup != nullptr, "this torch has no CUDA support; install a CUDA build of torch");
  void* stream = nullptr;
  STD_TORCH_CHECK(lookup(t.get_device_index(), &stream) == 0, "torch gave no CUDA stream");
  return stream;
}
inline Tensor visible(Tensor t) { return t; }
inline Tensor prepared(Tensor t) { return t; }

}   // namespace dk
#endif

namespace dk {

using torch::headeronly::ScalarType;

inline Tensor new_output(const Tensor& like, std::vector<int64_t> shape) {
  return prepared(torch::stable::new_empty(like, shape));
}
inline Tensor new_output(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  return prepared(torch::stable::new_empty(like, shape, dtype));
}
// in the memory order of `like`
inline Tensor new_output_like(const Tensor& like) { return prepared(torch::stable::empty_like(like)); }
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : visible(torch::stable::contiguous(t)); }
inline void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, error); }

}   // namespace dk
