// CUDA runtime: registration, kernel launch, function attributes.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "ptxsim/error.h"
#include "runtime/device.h"
#include "runtime/registry.h"

using namespace ptxsim;

namespace {

struct CallConfiguration {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
};
thread_local std::vector<CallConfiguration> call_stack;

Dim3 from(const dim3& d) { return {d.x, d.y, d.z}; }

cudaError_t launch(const void* func, dim3 grid, dim3 block, void** args, size_t shared, bool cooperative) {
  KernelEntry* k = registry().kernel(func);
  if (!k) return record(cudaErrorInvalidDeviceFunction, "launch of a function that is not a registered kernel");
  LaunchRequest r;
  r.grid = from(grid), r.block = from(block), r.dynamic_shared = shared, r.args = args, r.cooperative = cooperative;
  return launch_kernel(*k, r);
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) { return reinterpret_cast<void**>(registry().add_binary(wrapper)); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) { registry().remove_binary(reinterpret_cast<FatBinary*>(handle)); }
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  registry().add_kernel(reinterpret_cast<FatBinary*>(handle), host, name);
}
void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t bytes, int, int) {
  registry().add_variable(reinterpret_cast<FatBinary*>(handle), host, name, bytes);
}
void __cudaRegisterManagedVar(void**, void**, char*, const char* name, int, size_t, int, int) {
  record(cudaErrorNotSupported, std::string("__managed__ variable ") + name + " is not supported");
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  KernelEntry* k = registry().kernel(host);
  if (!k) return record(cudaErrorInvalidDeviceFunction);
  *kernel = reinterpret_cast<cudaKernel_t>(k);
  return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  call_stack.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (call_stack.empty()) return record(cudaErrorUnknown, "kernel call without a configuration");
  const CallConfiguration c = call_stack.back();
  call_stack.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, args, shared, false);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                                    cudaStream_t) {
  return launch(kernel, grid, block, args, shared, false);
}
cudaError_t cudaLaunchKernel(const void* func, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch(func, grid, block, args, shared, false);
}
cudaError_t cudaLaunchCooperativeKernel(const void* func, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t) {
  return launch(func, grid, block, args, shared, true);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* func, void** args) {
  KernelEntry* k = registry().kernel(func);
  if (!k) return record(cudaErrorInvalidDeviceFunction, "launch of a function that is not a registered kernel");
  LaunchRequest r;
  r.grid = from(config->gridDim), r.block = from(config->blockDim);
  r.dynamic_shared = config->dynamicSmemBytes, r.args = args;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    switch (a.id) {
      case cudaLaunchAttributeClusterDimension:
        r.cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
        r.explicit_cluster = true;
        break;
      case cudaLaunchAttributeCooperative:
        r.cooperative = a.val.cooperative != 0;
        break;
      // Scheduling and caching hints: no functional effect.
      case cudaLaunchAttributeIgnore:
      case cudaLaunchAttributeAccessPolicyWindow:
      case cudaLaunchAttributeSynchronizationPolicy:
      case cudaLaunchAttributeClusterSchedulingPolicyPreference:
      case cudaLaunchAttributeProgrammaticStreamSerialization:
      case cudaLaunchAttributePriority:
      case cudaLaunchAttributePreferredSharedMemoryCarveout:
        break;
      default:
        return record(cudaErrorNotSupported, "launch attribute " + std::to_string(a.id) + " is not supported");
    }
  }
  return launch_kernel(*k, r);
}

cudaError_t cudaFuncSetAttribute(const void* func, cudaFuncAttribute attribute, int value) {
  KernelEntry* k = registry().kernel(func);
  if (!k) return record(cudaErrorInvalidDeviceFunction, "cudaFuncSetAttribute: not a registered kernel");
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // hints
  if (value > device_properties().max_shared_optin)
    return record(cudaErrorInvalidValue, "kernel " + k->name + ": " + std::to_string(value) +
                                             " bytes of shared memory exceed the device's " +
                                             std::to_string(device_properties().max_shared_optin));
  k->max_dynamic_shared = value;
  return cudaSuccess;
}

cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* func) {
  KernelEntry* k = registry().kernel(func);
  if (!k) return record(cudaErrorInvalidDeviceFunction, "cudaFuncGetAttributes: not a registered kernel");
  try {
    const Program& p = k->binary->load().kernel(k->name);
    std::memset(out, 0, sizeof *out);
    out->sharedSizeBytes = p.static_shared_bytes;
    out->localSizeBytes = p.functions[0].local_bytes;
    out->maxThreadsPerBlock = p.max_threads ? static_cast<int>(p.max_threads) : 1024;
    out->numRegs = 32;  // PTX registers are virtual: the true number is ptxas's
    out->ptxVersion = out->binaryVersion = static_cast<int>(options().arch);
    out->maxDynamicSharedSizeBytes = k->max_dynamic_shared;
    return cudaSuccess;
  } catch (const std::exception& e) {
    return record(cudaErrorInvalidDeviceFunction, e.what());
  }
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* func, int threads,
                                                                   size_t shared, unsigned) {
  cudaFuncAttributes a;
  if (const cudaError_t e = cudaFuncGetAttributes(&a, func); e != cudaSuccess) return e;
  const Device& d = device_properties();
  const int warps = (threads + 31) / 32;
  int n = std::min(d.max_blocks_per_sm, d.max_threads_per_sm / std::max(32 * warps, 32));
  const size_t per_block = shared + a.sharedSizeBytes + 1024;
  n = std::min<int>(n, static_cast<int>(static_cast<size_t>(d.shared_per_sm) / per_block));
  *blocks = n;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* func, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, func, threads, shared, 0);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  (void)config;
  *clusters = device_properties().sms / 2;
  return cudaSuccess;
}

cudaError_t cudaGetFuncBySymbol(cudaFunction_t* f, const void* symbol) {
  KernelEntry* k = registry().kernel(symbol);
  if (!k) return record(cudaErrorInvalidDeviceFunction);
  *f = reinterpret_cast<cudaFunction_t>(k);
  return cudaSuccess;
}

}  // extern "C"
