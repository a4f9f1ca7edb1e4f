// remora._C: what is not an operator. It holds no tensor and needs no torch.
#include <cxxabi.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>

#include "build_info.h"
#include "common/cpu/isa.h"
#include "recurrence/gated_delta_rule/heuristics.h"

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

remora::DType dtype_of(const std::string& name) {
  if (name == "float64") return remora::DType::kFloat64;
  if (name == "float32") return remora::DType::kFloat32;
  if (name == "bfloat16") return remora::DType::kBFloat16;
  if (name == "float16") return remora::DType::kFloat16;
  throw py::value_error("dtype must be float64, float32, bfloat16 or float16, got " + name);
}

py::dict gated_delta_rule_fwd_plan(int64_t batch, int64_t seqlen, int64_t num_heads, int64_t num_value_heads,
                                   int64_t head_dim, int64_t value_dim, int64_t num_seqs, const std::string& dtype,
                                   int num_sms, int arch) {
  const remora::RecurrenceShape shape{batch, seqlen, num_heads, num_value_heads, head_dim, value_dim, num_seqs};
  const remora::FwdConfig config = remora::plan_fwd(shape, dtype_of(dtype), num_sms, arch);
  py::dict plan;
  plan["head_dim"] = config.head_dim;
  plan["num_stages"] = config.num_stages;
  plan["span_tokens"] = config.span_tokens;
  plan["num_map_slots"] = config.num_map_slots;
  plan["num_v_tiles"] = config.num_v_tiles;
  plan["num_summary_ctas"] = config.num_summary_ctas;
  plan["num_output_ctas"] = config.num_output_ctas;
  plan["smem_size"] = config.smem_size;
  plan["text"] = config.to_string();
  return plan;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, kernel resources and launch plans of remora.";
  m.def("build_info", &build_info, "What this copy of remora was built with.");
  m.def("kernel_table", &kernel_table,
        "Registers, spills, stack and static shared memory (bytes) of every kernel, per architecture compiled to "
        "machine code, as ptxas reported them.");
  m.def("gated_delta_rule_fwd_plan", &gated_delta_rule_fwd_plan, py::kw_only(), py::arg("batch"), py::arg("seqlen"),
        py::arg("num_heads"), py::arg("num_value_heads"), py::arg("head_dim"), py::arg("value_dim"),
        py::arg("num_seqs"), py::arg("dtype"), py::arg("num_sms"), py::arg("arch"),
        "The launch plan of gated_delta_rule_fwd for a shape on a device; head_dim 0: no kernel serves it.");
}
