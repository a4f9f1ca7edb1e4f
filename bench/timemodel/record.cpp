// Prints what the CUDA launch functions would launch for a shape, as JSON lines: kernel, grid, block, dynamic shared
// memory and parameters. Linked with the objects of csrc/**/*.cu in place of the CUDA runtime; nothing runs and no
// pointer is read.
//
// usage: record fwd|fwd_train|bwd|step B T H HV K V DTYPE NUM_SMS ARCH < "KERNEL SIZE [SIZE ...]" lines
#include <driver_types.h>
#include <vector_types.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "recurrence/gated_delta_rule/launch.h"

namespace {

struct CallConfiguration {
  dim3 grid, block;
  size_t shared;
};

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}
std::map<std::string, std::vector<int>> param_sizes;
std::vector<CallConfiguration> calls;

cudaError_t print_launch(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared) {
  const std::string& name = *static_cast<const std::string*>(kernel);
  std::printf("{\"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"smem\": %zu, \"params\": \"",
              name.c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
  size_t offset = 0;
  const std::vector<int>& sizes = param_sizes[name];
  for (size_t i = 0; i < sizes.size(); ++i) {
    const size_t alignment = sizes[i] % 8 == 0 ? 8 : sizes[i] % 4 == 0 ? 4 : 1;
    for (; offset % alignment; ++offset) std::printf("00");
    for (int k = 0; k < sizes[i]; ++k) std::printf("%02x", static_cast<const unsigned char*>(args[i])[k]);
    offset += sizes[i];
  }
  std::printf("\"}\n");
  return cudaSuccess;
}

}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) { return reinterpret_cast<void**>(&calls); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = &kernels().at(host);
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void*) {
  calls.push_back({grid, block, shared});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = calls.back().grid, *block = calls.back().block, *shared = calls.back().shared;
  *static_cast<void**>(stream) = nullptr;
  calls.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared, void*) {
  return print_launch(kernel, grid, block, args, shared);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t cudaMemsetAsync(void*, int, size_t bytes, void*) {
  std::printf("{\"kernel\": \"memset\", \"bytes\": %zu}\n", bytes);
  return cudaSuccess;
}
}

int main(int argc, char** argv) {
  using namespace remora;
  if (argc != 11) return 2;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    for (int size; words >> size;) param_sizes[name].push_back(size);
  }
  const std::string mode = argv[1], dtype = argv[8];
  const auto number = [&](int i) { return std::atoll(argv[i]); };
  RecurrenceShape shape{};
  shape.batch = shape.num_seqs = number(2), shape.seqlen = number(3), shape.num_heads = number(4);
  shape.num_value_heads = number(5), shape.head_dim = number(6), shape.value_dim = number(7);
  const DType type = dtype == "bf16" ? DType::kBFloat16 : dtype == "fp16" ? DType::kFloat16 : DType::kFloat32;
  const DType saved = type == DType::kBFloat16 ? type : DType::kFloat32;
  Launch launch;
  launch.num_sms = static_cast<int>(number(9)), launch.arch = static_cast<int>(number(10));
  uint64_t next = 0x7f0000000000;
  const auto pointer = [&] {
    next += uint64_t{1} << 36;
    return reinterpret_cast<void*>(next);
  };
  const TokenStrides qk{shape.seqlen * shape.num_heads * shape.head_dim, shape.num_heads * shape.head_dim,
                        shape.head_dim};
  const TokenStrides vs{shape.seqlen * shape.num_value_heads * shape.value_dim, shape.num_value_heads * shape.value_dim,
                        shape.value_dim};
  Error error = nullptr;
  if (mode == "bwd") {
    GatedDeltaRuleBwdParams p{};
    p.shape = shape, p.dtype = type, p.state_dtype = DType::kFloat32, p.saved_dtype = saved;
    p.scale = 0.088;
    p.q = pointer(), p.k = pointer(), p.v = pointer(), p.g = pointer(), p.beta = pointer();
    p.q_stride = p.k_stride = qk, p.v_stride = vs;
    p.saved_states = pointer(), p.d_o = pointer();
    p.dq = pointer(), p.dk = pointer(), p.dv = pointer(), p.dg = pointer(), p.dbeta = pointer();
    if (gated_delta_rule_bwd_workspace(p, launch) > 0) p.workspace = pointer();
    error = gated_delta_rule_bwd(p, launch);
  } else if (mode == "step") {
    GatedDeltaRuleStepParams p{};
    p.shape = shape, p.dtype = type, p.state_dtype = DType::kFloat32, p.scale = 0.088;
    p.q = pointer(), p.k = pointer(), p.v = pointer(), p.g = pointer(), p.beta = pointer();
    p.q_stride = p.k_stride = qk, p.v_stride = vs;
    p.final_state = pointer(), p.initial_state = p.final_state, p.num_slots = shape.batch, p.o = pointer();
    error = gated_delta_rule_step(p, launch);
  } else {
    GatedDeltaRuleFwdParams p{};
    p.shape = shape, p.dtype = type, p.state_dtype = DType::kFloat32, p.saved_dtype = saved;
    p.scale = 0.088;
    p.q = pointer(), p.k = pointer(), p.v = pointer(), p.g = pointer(), p.beta = pointer();
    p.q_stride = p.k_stride = qk, p.v_stride = vs;
    p.o = pointer();
    if (mode == "fwd_train") p.saved_states = pointer();
    if (gated_delta_rule_fwd_workspace(p, launch) > 0) p.workspace = pointer();
    error = gated_delta_rule_fwd(p, launch);
  }
  if (error) std::fprintf(stderr, "%s\n", error);
  return error ? 1 : 0;
}
