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

/// Runs task(i, scratch) for i in [0, count) in this order, on one thread per `grain` tasks at most; a thread that is
/// done takes the next task. False if no thread found memory for its scratch: no task ran then.
template <class Task>
bool run_tasks(ParallelFor parallel_for, int64_t count, int64_t grain, int64_t scratch_bytes, const Task& task) {
  std::atomic<int64_t> next{0};
  parallel_for(count, grain, [&](int64_t, int64_t) {
    void* scratch = thread_scratch(scratch_bytes);
    if (!scratch) return;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i, scratch);
  });
  return next >= count;
}

}  // namespace remora
