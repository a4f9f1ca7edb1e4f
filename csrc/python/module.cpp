// remora._C: what is not an operator. It holds no tensor and needs no torch.
#include <cxxabi.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>

#include "build_info.h"
#include "common/cpu/isa.h"

namespace py = pybind11;

namespace {

struct KernelResources {
  const char* mangled_name;
  const char* arch;
  int registers, spill_stores, spill_loads, stack, static_shared;
};

constexpr KernelResources kKernels[] = {
#include "kernel_resources.inc"
    {nullptr, nullptr, 0, 0, 0, 0, 0},
};

std::string demangle(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string out = status == 0 ? text : name;
  std::free(text);
  return out;
}

py::dict build_info() {
  py::dict info;
  info["version"] = kVersion;
  info["torch"] = kTorchVersion;
  info["cuda"] = kCudaVersion;
  info["cuda_architectures"] = py::str(kCudaArchitectures).attr("split")();
  info["cuda_off_reason"] = kCudaOffReason;
  info["compiler"] = kCompiler;
  info["simulator"] = kHasSimulator;
  info["cpu_capability"] = remora::cpu::isa_name();
  return info;
}

py::list kernel_table() {
  py::list rows;
  for (const KernelResources& kernel : kKernels) {
    if (kernel.mangled_name == nullptr) break;
    py::dict row;
    row["kernel"] = demangle(kernel.mangled_name);
    row["arch"] = kernel.arch;
    row["registers"] = kernel.registers;
    row["spill_stores"] = kernel.spill_stores;
    row["spill_loads"] = kernel.spill_loads;
    row["stack"] = kernel.stack;
    row["static_shared"] = kernel.static_shared;
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, kernel resources and launch plans of remora.";
  m.def("build_info", &build_info, "What this copy of remora was built with.");
  m.def("kernel_table", &kernel_table,
        "Registers, spills, stack and static shared memory (bytes) of every kernel, per architecture compiled to "
        "machine code, as ptxas reported them.");
}
