// dalle_kernels._host: C++ functions that tests compare with their Python counterparts. In-place builds only; the
// package does not use it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/features.h"
#include "cpu/philox.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host routines of dalle_kernels, for its tests.";
  py::enum_<dk::Isa>(m, "Isa")
      .value("portable", dk::Isa::portable)
      .value("avx2", dk::Isa::avx2)
      .value("avx512", dk::Isa::avx512)
      .value("avx512_bf16", dk::Isa::avx512_bf16)
      .value("amx", dk::Isa::amx);
  m.def(
      "choose_isa",
      [](const std::vector<dk::Isa>& supported, const std::string& vendor, const std::string& request) {
        const dk::IsaChoice choice = dk::choose_isa(supported, vendor, request);
        return py::make_tuple(dk::isa_name(choice.isa), choice.reason);
      },
      py::arg("supported"), py::arg("vendor"), py::arg("request"),
      "The instruction set, and why, for a processor that supports some of them.");
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
}
