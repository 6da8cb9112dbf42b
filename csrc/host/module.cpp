// dalle_kernels._host: what was built and what this processor has. Torch-free, so it loads whatever happens to torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/features.h"
#include "cpu/philox.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information, CPU features and host routines of dalle_kernels.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = DK_VERSION;
        info["compiler"] = DK_COMPILER;
        info["built"] = __DATE__;
        std::vector<std::string> isas;
        for (dk::Isa isa : dk::isas_compiled()) isas.push_back(dk::isa_name(isa));
        info["cpu_isas"] = isas;
        py::dict cuda;
#if defined(DK_CUDA_ARCHITECTURES)
        cuda["compiler"] = DK_CUDA_COMPILER;
        cuda["architectures"] = py::str(DK_CUDA_ARCHITECTURES).attr("split")(",");
#else
        cuda["not_built"] = DK_CUDA_ABSENT;
#endif
        info["cuda"] = cuda;
        return info;
      },
      "Version, compilers, and what kernels were compiled for: instruction sets; GPU architectures, or why there are "
      "none.");
  m.def(
      "cpu_isas",
      [] {
        py::dict supported;
        for (dk::Isa isa : dk::isas_compiled()) supported[dk::isa_name(isa)] = dk::isa_supported(isa);
        return supported;
      },
      "Compiled instruction sets and whether this processor has them.");
  m.def(
      "philox",
      [](int64_t seed, int64_t offset, int64_t first_index, int64_t count) {
        if (first_index < 0 || count < 0) throw py::value_error("first_index and count must not be negative");
        py::array_t<uint32_t> words(count);
        uint32_t* out = words.mutable_data();
        for (int64_t i = 0; i < count; ++i) {
          uint32_t block[4];
          dk::philox_block({static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)},
                           static_cast<uint64_t>(first_index + i) / 4, block);
          out[i] = block[(first_index + i) % 4];
        }
        return words;
      },
      py::arg("seed"), py::arg("offset"), py::arg("first_index"), py::arg("count"),
      "The random words (uint32) of `count` indices from `first_index`, as dalle_kernels.philox defines them.");
  m.def(
      "active_isa", [] { return std::string(dk::isa_name(dk::isa_active())); },
      "The instruction set the CPU kernels run on.");
}
