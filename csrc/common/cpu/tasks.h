// Tasks of unequal length over the caller's threads, and the scratch memory of each thread.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "common/parallel.h"

namespace remora {

/// This thread's buffer of at least `bytes`, 64-byte aligned; it lives until a larger one is asked for. Null if there
/// is no memory.
inline void* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local int64_t capacity = 0;
  if (capacity < bytes) {
    buffer.reset(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
    capacity = buffer ? bytes : 0;
  }
  return buffer.get();
}

/// Runs task(i, scratch) for i in [0, count), at least `grain` of them per thread; a thread that is done takes the next
/// task. False if a thread found no memory for its scratch: its tasks did not run.
template <class Task>
bool run_tasks(ParallelFor parallel_for, int64_t count, int64_t grain, int64_t scratch_bytes, const Task& task) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> ok{true};
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(scratch_bytes);
    if (!scratch) ok = false;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t mine = next.fetch_add(1, std::memory_order_relaxed);
      if (scratch) task(mine, scratch);
    }
  });
  return ok;
}

}  // namespace remora
