// Shared by the launchers of all devices.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/dtype.h"

namespace dk {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::float32;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::bfloat16;
    case torch::headeronly::ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "dtype must be float32, bfloat16 or float16");
  }
  return DType::float32;
}

}   // namespace dk
