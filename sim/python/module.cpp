// Python module `ptxsim`: load PTX, launch kernels, read counters.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstring>

#include "check/allocations.h"
#include "ptxsim/ptxsim.h"
#include "runtime/tensor_map.h"
#include "sim/launch.h"
#include "sim/module.h"

namespace py = pybind11;
using namespace ptxsim;

namespace {

Dim3 to_dim3(const py::object& o) {
  Dim3 d;
  if (py::isinstance<py::int_>(o)) {
    d.x = o.cast<uint32_t>();
    return d;
  }
  const auto t = o.cast<std::vector<uint32_t>>();
  if (t.empty() || t.size() > 3) throw py::value_error("a dimension is an int or up to three ints");
  d.x = t[0];
  if (t.size() > 1) d.y = t[1];
  if (t.size() > 2) d.z = t[2];
  return d;
}

py::object parsed(const std::string& json) { return py::module_::import("json").attr("loads")(json); }

/// Writes a Python argument as the kernel parameter's type.
void store_argument(const py::handle& value, const KernelParam& p, uint8_t* out) {
  if (py::isinstance<py::bytes>(value)) {
    const auto text = value.cast<std::string>();
    if (text.size() != p.size)
      throw py::value_error("parameter " + p.name + " has " + std::to_string(p.size) + " bytes, not " +
                            std::to_string(text.size()));
    std::memcpy(out, text.data(), p.size);
    return;
  }
  if (p.is_array) throw py::type_error("parameter " + p.name + " is a struct: pass bytes");
  if (py::hasattr(value, "data_ptr")) {
    const auto address = value.attr("data_ptr")().cast<uint64_t>();
    if (p.size != 8) throw py::type_error("parameter " + p.name + " is no pointer");
    std::memcpy(out, &address, 8);
    return;
  }
  if (py::hasattr(value, "__array_interface__")) {
    const auto address = value.attr("__array_interface__")["data"].cast<py::tuple>()[0].cast<uint64_t>();
    if (p.size != 8) throw py::type_error("parameter " + p.name + " is no pointer");
    std::memcpy(out, &address, 8);
    return;
  }
  if (py::isinstance<py::float_>(value)) {
    // Triton declares float arguments .f32, nvcc too; a .b32 parameter given a float is one as well.
    const auto x = value.cast<double>();
    const auto f = static_cast<float>(x);
    if (p.size == 4)
      std::memcpy(out, &f, 4);
    else if (p.size == 8)
      std::memcpy(out, &x, 8);
    else
      throw py::type_error("parameter " + p.name + " cannot take a float");
    return;
  }
  if (value.is_none()) {
    std::memset(out, 0, p.size);
    return;
  }
  if (p.type == Type::f32 || p.type == Type::f64) {
    store_argument(py::float_(value.cast<double>()), p, out);
    return;
  }
  uint64_t bits;
  if (py::int_(0).attr("__le__")(value).cast<bool>())
    bits = value.cast<uint64_t>();
  else
    bits = static_cast<uint64_t>(value.cast<int64_t>());
  std::memcpy(out, &bits, p.size);
}

py::object launch(const Module& module, const std::string& name, const py::object& grid, const py::object& block,
                  const py::sequence& args, uint32_t smem_bytes, const py::object& cluster,
                  const py::kwargs& overrides) {
  static std::atomic<uint64_t> launches{0};
  const Program& p = module.kernel(name);
  Launch l;
  l.program = &p;
  l.grid = to_dim3(grid), l.block = to_dim3(block), l.cluster = to_dim3(cluster);
  l.explicit_cluster = l.cluster.count() > 1;
  if (p.required_cluster[0] && !l.explicit_cluster) {
    l.cluster = {p.required_cluster[0], p.required_cluster[1], p.required_cluster[2]};
    l.explicit_cluster = true;
  }
  l.dynamic_shared = smem_bytes;
  l.options = options();
  l.options.memory_stats = true;
  for (const auto& [key, value] : overrides) l.options.set(py::str(key), py::str(value));
  l.id = launches.fetch_add(1);
  l.params.assign(p.param_bytes + 128, 0);  // never empty: its address may be taken
  if (py::len(args) != p.params.size())
    throw py::value_error("kernel " + name + " has " + std::to_string(p.params.size()) + " parameters, " +
                          std::to_string(py::len(args)) + " arguments were given");
  for (size_t i = 0; i < p.params.size(); ++i)
    store_argument(args[i], p.params[i], l.params.data() + p.params[i].offset);
  LaunchStats stats;
  {
    const py::gil_scoped_release release;
    stats = run_launch(l);
    accumulate(p, stats);
  }
  return parsed(to_json({stats, classes_of(p, stats)}));
}

std::vector<std::tuple<std::string, std::string, uint32_t>> params(const Module& m, const std::string& kernel) {
  std::vector<std::tuple<std::string, std::string, uint32_t>> out;
  for (const KernelParam& p : m.kernel(kernel).params) out.emplace_back(p.name, type_name(p.type), p.size);
  return out;
}

void register_tensor(const py::object& t, const std::string& name, bool initialised) {
  const auto address = t.attr("data_ptr")().cast<uint64_t>();
  const auto bytes = t.attr("numel")().cast<uint64_t>() * t.attr("element_size")().cast<uint64_t>();
  register_range(reinterpret_cast<const void*>(address), bytes, name, initialised);
}

/// A CUtensorMap as bytes. Sizes and box in elements, strides of dimensions 1.. in bytes.
py::bytes tensor_map(uint64_t address, const std::string& type, const std::vector<uint64_t>& size,
                     const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box, int swizzle) {
  const std::map<std::string, CUtensorMapDataType> types = {
      {"u8", CU_TENSOR_MAP_DATA_TYPE_UINT8},      {"f16", CU_TENSOR_MAP_DATA_TYPE_FLOAT16},
      {"bf16", CU_TENSOR_MAP_DATA_TYPE_BFLOAT16}, {"s32", CU_TENSOR_MAP_DATA_TYPE_INT32},
      {"f32", CU_TENSOR_MAP_DATA_TYPE_FLOAT32},   {"f64", CU_TENSOR_MAP_DATA_TYPE_FLOAT64}};
  const std::map<int, CUtensorMapSwizzle> swizzles = {{0, CU_TENSOR_MAP_SWIZZLE_NONE},
                                                      {32, CU_TENSOR_MAP_SWIZZLE_32B},
                                                      {64, CU_TENSOR_MAP_SWIZZLE_64B},
                                                      {128, CU_TENSOR_MAP_SWIZZLE_128B}};
  if (!types.count(type) || !swizzles.count(swizzle)) throw py::value_error("unknown type or swizzle");
  if (strides.size() + 1 < size.size() || box.size() != size.size()) throw py::value_error("rank mismatch");
  const std::vector<uint32_t> ones(size.size(), 1);
  CUtensorMap map;
  const CUresult r = encode_tensor_map_tiled(&map, types.at(type), static_cast<uint32_t>(size.size()),
                                             reinterpret_cast<void*>(address), size.data(), strides.data(), box.data(),
                                             ones.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles.at(swizzle),
                                             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) throw py::value_error("invalid tensor map");
  return {reinterpret_cast<const char*>(&map), sizeof map};
}

}  // namespace

PYBIND11_MODULE(_ptxsim, m) {
  m.doc() = "Functional CUDA/PTX simulator";
  py::register_exception<Error>(m, "Error", PyExc_RuntimeError);

  py::class_<Module>(m, "Module")
      .def("kernels", &Module::kernels, "names of the kernels")
      .def("params", &params, py::arg("kernel"), "(name, type, bytes) of each parameter")
      .def("launch", &launch, py::arg("name"), py::arg("grid"), py::arg("block"), py::arg("args"),
           py::arg("smem_bytes") = 0, py::arg("cluster") = py::int_(1),
           "Runs a kernel and returns its counters. Keyword arguments override options for this launch.");

  m.def("load_ptx", [](const std::string& text) { return std::make_unique<Module>(text); }, py::arg("text"));
  m.def("set_option", [](const std::string& name, const py::object& value) { options().set(name, py::str(value)); });
  m.def("option", [](const std::string& name) { return options().get(name); });
  m.def("register", &register_tensor, py::arg("tensor"), py::arg("name") = "tensor", py::arg("initialised") = true,
        "Makes a tensor's storage known to memcheck (and, if not initialised, to initcheck).");
  m.def("unregister", [](const py::object& t) {
    unregister_range(reinterpret_cast<const void*>(t.attr("data_ptr")().cast<uint64_t>()));
  });
  m.def("tensor_map", &tensor_map, py::arg("address"), py::arg("type"), py::arg("size"), py::arg("strides"),
        py::arg("box"), py::arg("swizzle") = 0);
  m.def("stats", [] { return parsed(stats_json()); }, "Counters accumulated per kernel name.");
  m.def("reset_stats", &reset_totals);
  m.def("stats_table", &stats_table);
}
