// remora._C: what is not an operator. It holds no tensor and needs no torch.
#include <pybind11/pybind11.h>

#include "build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of remora.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = kVersion;
        info["torch"] = kTorchVersion;
        info["cuda"] = kCudaVersion;
        info["cuda_architectures"] = py::str(kCudaArchitectures).attr("split")();
        info["cuda_off_reason"] = kCudaOffReason;
        info["compiler"] = kCompiler;
        info["simulator"] = kHasSimulator;
        return info;
      },
      "What this copy of remora was built with.");
}
