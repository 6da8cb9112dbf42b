// Build information and supported instruction sets, which dalle_kernels/build_info.py reads through ctypes.
#include <string>

#include "cpu/features.h"

#define DK_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

std::string cuda() {
#if defined(DK_CUDA_ARCHITECTURES)
  return "{\"compiler\": " + quoted(DK_CUDA_COMPILER) + ", \"architectures\": " + quoted(DK_CUDA_ARCHITECTURES) + "}";
#else
  return "{\"not_built\": " + quoted(DK_CUDA_ABSENT) + "}";
#endif
}

std::string instruction_sets() {
  std::string out;
  for (dk::Isa isa : dk::isas_compiled()) {
    out += (out.empty() ? "" : ", ") + quoted(dk::isa_name(isa)) + ": " + (dk::isa_supported(isa) ? "true" : "false");
  }
  return "{" + out + "}";
}

}   // namespace

// JSON: version, compilers, the GPU architectures or why there are none, and for each compiled instruction set whether
// this processor supports it.
DK_EXPORT const char* dalle_kernels_build_info() {
  static const std::string info = "{\"version\": " + quoted(DK_VERSION) + ", \"compiler\": " + quoted(DK_COMPILER) +
                                  ", \"built\": " + quoted(__DATE__) + ", \"cpu_isas\": " + instruction_sets() +
                                  ", \"cuda\": " + cuda() + "}";
  return info.c_str();
}

// The instruction set that the CPU kernels run on.
DK_EXPORT const char* dalle_kernels_active_isa() { return dk::isa_name(dk::isa_choice().isa); }
DK_EXPORT const char* dalle_kernels_isa_reason() { return dk::isa_choice().reason.c_str(); }
