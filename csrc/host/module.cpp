// dalle_kernels._host: what was built and what this processor has. Torch-free, so it loads whatever happens to torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/features.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information, CPU features and host routines of dalle_kernels.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = DK_VERSION;
    info["compiler"] = DK_COMPILER;
    info["built"] = __DATE__;
    std::vector<std::string> isas;
    for (dk::Isa isa : dk::isas_compiled()) isas.push_back(dk::isa_name(isa));
    info["cpu_isas"] = isas;
    return info;
  }, "Version, compiler and the instruction sets that kernels were compiled for.");
  m.def("cpu_isas", [] {
    py::dict supported;
    for (dk::Isa isa : dk::isas_compiled()) supported[dk::isa_name(isa)] = dk::isa_supported(isa);
    return supported;
  }, "Compiled instruction sets and whether this processor has them.");
  m.def("active_isa", [] { return std::string(dk::isa_name(dk::isa_active())); }, "The instruction set the CPU kernels run on.");
}
