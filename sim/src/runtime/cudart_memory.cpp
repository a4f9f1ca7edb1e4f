// CUDA runtime: memory. Device memory is host memory.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "check/allocations.h"
#include "ptxsim/ptxsim.h"
#include "runtime/registry.h"

using namespace ptxsim;

namespace ptxsim {
void register_range(const void* p, uint64_t bytes, const std::string& name, bool initialised) {
  allocations().add(p, bytes, name, initialised);
}
void unregister_range(const void* p) { allocations().remove(p); }
}  // namespace ptxsim

namespace {

cudaError_t allocate(void** out, size_t bytes, const char* what) {
  // 256-byte alignment, as the driver's; a little slack so that an access just
  // behind the end hits the simulator's padding and not another allocation.
  void* p = std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 256);
  if (!p) return record(cudaErrorMemoryAllocation);
  allocations().add(p, bytes, what, false);
  *out = p;
  return cudaSuccess;
}
cudaError_t release(void* p) {
  if (!p) return cudaSuccess;
  if (!allocations().remove(p, true))
    return record(cudaErrorInvalidValue, "cudaFree of a pointer that was not allocated");
  std::free(p);
  return cudaSuccess;
}
cudaError_t copy(void* dst, const void* src, size_t bytes) {
  std::memmove(dst, src, bytes);
  allocations().mark_written(dst, bytes);
  return cudaSuccess;
}
cudaError_t copy2d(void* dst, size_t dpitch, const void* src, size_t spitch, size_t width, size_t height) {
  for (size_t y = 0; y < height; ++y)
    copy(static_cast<char*>(dst) + y * dpitch, static_cast<const char*>(src) + y * spitch, width);
  return cudaSuccess;
}
cudaError_t fill(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  allocations().mark_written(p, bytes);
  return cudaSuccess;
}
cudaError_t symbol_address(void** out, const void* symbol) {
  VariableEntry* v = registry().variable(symbol);
  if (!v) return record(cudaErrorInvalidSymbol, "unknown device symbol");
  try {
    *out = reinterpret_cast<void*>(v->binary->load().variable_address(v->name));
    return cudaSuccess;
  } catch (const std::exception& e) {
    return record(cudaErrorInvalidSymbol, e.what());
  }
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** p, size_t bytes) { return allocate(p, bytes, "cudaMalloc"); }
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return allocate(p, bytes, "cudaMallocAsync"); }
cudaError_t cudaMallocManaged(void** p, size_t bytes, unsigned) { return allocate(p, bytes, "cudaMallocManaged"); }
cudaError_t cudaMallocHost(void** p, size_t bytes) { return allocate(p, bytes, "cudaMallocHost"); }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return allocate(p, bytes, "cudaHostAlloc"); }
cudaError_t cudaMallocPitch(void** p, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return allocate(p, *pitch * height, "cudaMallocPitch");
}
cudaError_t cudaFree(void* p) { return release(p); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return release(p); }
cudaError_t cudaFreeHost(void* p) { return release(p); }

cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) { return copy(d, s, n); }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t) { return copy(d, s, n); }
cudaError_t cudaMemcpy2D(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind) {
  return copy2d(d, dp, s, sp, w, h);
}
cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind,
                              cudaStream_t) {
  return copy2d(d, dp, s, sp, w, h);
}
cudaError_t cudaMemset(void* p, int v, size_t n) { return fill(p, v, n); }
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { return fill(p, v, n); }
cudaError_t cudaMemset2D(void* p, size_t pitch, int v, size_t w, size_t h) {
  for (size_t y = 0; y < h; ++y) fill(static_cast<char*>(p) + y * pitch, v, w);
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** out, const void* symbol) { return symbol_address(out, symbol); }
cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  VariableEntry* v = registry().variable(symbol);
  if (!v) return record(cudaErrorInvalidSymbol, "unknown device symbol");
  *bytes = v->bytes;
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* s, size_t n, size_t offset, cudaMemcpyKind) {
  void* p;
  if (const cudaError_t e = symbol_address(&p, symbol); e != cudaSuccess) return e;
  return copy(static_cast<char*>(p) + offset, s, n);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* s, size_t n, size_t offset, cudaMemcpyKind k,
                                    cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, s, n, offset, k);
}
cudaError_t cudaMemcpyFromSymbol(void* d, const void* symbol, size_t n, size_t offset, cudaMemcpyKind) {
  void* p;
  if (const cudaError_t e = symbol_address(&p, symbol); e != cudaSuccess) return e;
  return copy(d, static_cast<char*>(p) + offset, n);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* d, const void* symbol, size_t n, size_t offset, cudaMemcpyKind k,
                                      cudaStream_t) {
  return cudaMemcpyFromSymbol(d, symbol, n, offset, k);
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = *total = size_t{80} << 30;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  std::memset(a, 0, sizeof *a);
  a->type = cudaMemoryTypeDevice;
  a->devicePointer = a->hostPointer = const_cast<void*>(p);
  return cudaSuccess;
}

}  // extern "C"
