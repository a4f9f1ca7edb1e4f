// Host functions and variables that nvcc's start-up code registers.
#pragma once
#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "sim/launch.h"
#include "sim/module.h"

namespace ptxsim {

/// One registered fat binary; its PTX is parsed when first used.
struct FatBinary {
  const void* wrapper = nullptr;
  std::mutex mutex;
  std::unique_ptr<Module> module;
  Module& load();
};

struct KernelEntry {
  FatBinary* binary = nullptr;
  std::string name;
  int max_dynamic_shared = 48 * 1024;
};
struct VariableEntry {
  FatBinary* binary = nullptr;
  std::string name;
  size_t bytes = 0;
};

class Registry {
 public:
  FatBinary* add_binary(const void* wrapper);
  void remove_binary(FatBinary* b);
  void add_kernel(FatBinary* b, const void* host, const char* name);
  void add_variable(FatBinary* b, const void* host, const char* name, size_t bytes);
  KernelEntry* kernel(const void* host_or_handle);
  VariableEntry* variable(const void* host);

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<FatBinary>> binaries_;
  std::unordered_map<const void*, std::unique_ptr<KernelEntry>> kernels_;  ///< by host stub
  std::unordered_map<const void*, KernelEntry*> handles_;                  ///< by entry address
  std::unordered_map<const void*, VariableEntry> variables_;
};
Registry& registry();

struct LaunchRequest {
  Dim3 grid, block, cluster;
  bool explicit_cluster = false, cooperative = false;
  size_t dynamic_shared = 0;
  void** args = nullptr;
};
cudaError_t launch_kernel(KernelEntry& k, const LaunchRequest& request);

/// Records an error for cudaGetLastError and returns it.
cudaError_t record(cudaError_t e);
/// Also prints the message: failures are never silent.
cudaError_t record(cudaError_t e, const std::string& message);

}  // namespace ptxsim
