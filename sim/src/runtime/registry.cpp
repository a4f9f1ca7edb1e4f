#include "runtime/registry.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "ptxsim/error.h"
#include "ptxsim/ptxsim.h"
#include "runtime/fatbin.h"

namespace ptxsim {
namespace {

std::mutex error_mutex;
std::string error_message;
thread_local cudaError_t last_error = cudaSuccess;
std::atomic<uint64_t> launches{0};

void print_stats_at_exit() { std::fputs(stats_table().c_str(), stderr); }

}  // namespace

Module& FatBinary::load() {
  const std::lock_guard lock(mutex);
  if (!module) module = std::make_unique<Module>(ptx_of_fatbin(wrapper, options().arch));
  return *module;
}

FatBinary* Registry::add_binary(const void* wrapper) {
  const std::lock_guard lock(mutex_);
  binaries_.push_back(std::make_unique<FatBinary>());
  binaries_.back()->wrapper = wrapper;
  return binaries_.back().get();
}

void Registry::remove_binary(FatBinary* b) {
  const std::lock_guard lock(mutex_);
  for (auto it = kernels_.begin(); it != kernels_.end();) {
    if (it->second->binary != b) {
      ++it;
      continue;
    }
    handles_.erase(it->second.get());
    it = kernels_.erase(it);
  }
  for (auto it = variables_.begin(); it != variables_.end();)
    it = it->second.binary == b ? variables_.erase(it) : std::next(it);
  std::erase_if(binaries_, [b](const auto& owned) { return owned.get() == b; });
}

void Registry::add_kernel(FatBinary* b, const void* host, const char* name) {
  const std::lock_guard lock(mutex_);
  auto entry = std::make_unique<KernelEntry>();
  entry->binary = b;
  entry->name = name;
  handles_[entry.get()] = entry.get();
  kernels_[host] = std::move(entry);
}

void Registry::add_variable(FatBinary* b, const void* host, const char* name, size_t bytes) {
  const std::lock_guard lock(mutex_);
  variables_[host] = {b, name, bytes};
}

KernelEntry* Registry::kernel(const void* p) {
  const std::lock_guard lock(mutex_);
  if (auto it = kernels_.find(p); it != kernels_.end()) return it->second.get();
  if (auto it = handles_.find(p); it != handles_.end()) return it->second;
  return nullptr;
}

VariableEntry* Registry::variable(const void* host) {
  const std::lock_guard lock(mutex_);
  auto it = variables_.find(host);
  return it == variables_.end() ? nullptr : &it->second;
}

Registry& registry() {
  static Registry* r = new Registry;  // used by other objects' static destructors
  return *r;
}

cudaError_t record(cudaError_t e) {
  if (e != cudaSuccess) last_error = e;
  return e;
}

cudaError_t record(cudaError_t e, const std::string& message) {
  {
    const std::lock_guard lock(error_mutex);
    error_message = message;
  }
  std::fprintf(stderr, "ptxsim: %s\n", message.c_str());
  return record(e);
}

cudaError_t peek_last_error() { return last_error; }
cudaError_t take_last_error() { return std::exchange(last_error, cudaSuccess); }

std::string last_error_message() {
  const std::lock_guard lock(error_mutex);
  return error_message;
}

cudaError_t launch_kernel(KernelEntry& k, const LaunchRequest& r) {
  try {
    const Program& p = k.binary->load().kernel(k.name);
    if (r.dynamic_shared + p.static_shared_bytes > 48 * 1024 &&
        r.dynamic_shared > static_cast<size_t>(k.max_dynamic_shared))
      return record(cudaErrorInvalidValue, "kernel " + k.name + ": " + std::to_string(r.dynamic_shared) +
                                               " bytes of dynamic shared memory exceed its limit of " +
                                               std::to_string(k.max_dynamic_shared) +
                                               " (cudaFuncAttributeMaxDynamicSharedMemorySize)");
    Launch launch;
    launch.program = &p;
    launch.grid = r.grid, launch.block = r.block, launch.cluster = r.cluster;
    launch.explicit_cluster = r.explicit_cluster;
    launch.cooperative = r.cooperative;
    if (p.required_cluster[0] && !r.explicit_cluster) {
      launch.cluster = {p.required_cluster[0], p.required_cluster[1], p.required_cluster[2]};
      launch.explicit_cluster = true;
    }
    launch.dynamic_shared = static_cast<uint32_t>(r.dynamic_shared);
    launch.options = options();
    launch.id = launches.fetch_add(1);
    launch.params.assign(std::max<size_t>(p.param_bytes, 16) + 64, 0);
    for (size_t i = 0; i < p.params.size(); ++i)
      std::memcpy(launch.params.data() + p.params[i].offset, r.args[i], p.params[i].size);
    accumulate(p, run_launch(launch));
    if (options().stats) {
      static std::once_flag once;
      std::call_once(once, [] { std::atexit(print_stats_at_exit); });
    }
    return cudaSuccess;
  } catch (const std::exception& e) {
    return record(cudaErrorLaunchFailure, e.what());
  }
}

}  // namespace ptxsim
