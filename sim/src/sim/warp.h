// A warp: 32 lanes in lock-step, with divergence by per-lane program counters.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "sim/program.h"

namespace ptxsim {

struct Cta;
struct Launch;
struct AsyncQueues;
class WarpObserver;

/// Lanes that stand at the same instruction of the same activation. A warp is
/// a set of such groups with disjoint masks; one of them runs at a time.
struct LaneGroup {
  enum Wait : uint8_t { ready, lanes, barrier };
  uint32_t mask = 0;
  uint32_t pc = 0;
  uint32_t frame = 0;
  uint32_t local = 0;
  Wait wait = ready;
  uint8_t barrier_id = 0;

  bool same_place(const LaneGroup& o) const { return pc == o.pc && frame == o.frame && local == o.local; }
};

struct alignas(64) Warp {
  // ---- what handlers use ---------------------------------------------------
  uint8_t* bank[3] = {nullptr, nullptr, nullptr};  ///< by Bank; [0] = current frame
  uint32_t exec = 0;                               ///< lanes that execute the current instruction
  uint32_t active = 0;                             ///< lanes of the running group
  uint32_t pc = 0;                                 ///< the next instruction
  uint32_t frame = 0;                              ///< offset of the current frame in `registers`
  uint32_t local = 0;                              ///< offset of the current local frame, same for all lanes
  bool stop = false;                               ///< set by a handler: leave the run loop
  bool polled = false;                             ///< made no progress but to look at memory
  Cta* cta = nullptr;
  Launch* launch = nullptr;
  const Program* program = nullptr;
  AsyncQueues* async = nullptr;

  uint32_t index = 0;      ///< warp of the CTA
  uint32_t populated = 0;  ///< lanes that exist (last warp of an odd block)
  uint32_t exited = 0;
  uint64_t executed = 0;    ///< warp instructions so far
  uint32_t sync_epoch = 0;  ///< counts warp-level synchronisations, for racecheck

  template <class T>
  const T* src(const Operand& o) const {
    return reinterpret_cast<const T*>(bank[static_cast<int>(o.bank)] + o.offset);
  }
  template <class T>
  T* dst(const Operand& o) const {
    return reinterpret_cast<T*>(bank[0] + o.offset);
  }
  uint32_t predicate(const Operand& o) const { return *src<uint32_t>(o); }
  void set_predicate(const Operand& o, uint32_t lanes_true) {
    if (!o.present()) return;
    auto* p = dst<uint32_t>(o);
    *p = (*p & ~exec) | (lanes_true & exec);
  }
  uint32_t live() const { return populated & ~exited; }
  bool done() const { return live() == 0; }

  // ---- local memory: lane-major ----------------------------------------------
  std::vector<uint8_t> local_memory;
  uint32_t local_capacity = 0;  ///< bytes per lane
  uint32_t local_used = 0;      ///< high-water mark
  void reserve_local(uint32_t bytes_per_lane);
  uint8_t* local_at(uint32_t lane, uint64_t offset) {
    return local_memory.data() + static_cast<size_t>(lane) * local_capacity + offset;
  }

  // ---- control flow (warp.cpp) -----------------------------------------------
  void start(Cta& cta, uint32_t index, uint32_t lane_count);
  /// Runs up to `quantum` instructions. Returns the number executed.
  uint32_t run(uint32_t quantum);
  bool runnable() const;

  void branch(uint32_t target);                 ///< exec lanes go to target
  void branch_each(const uint32_t* target);     ///< exec lanes go to target[lane]
  void call(uint32_t function, uint32_t site);  ///< exec lanes call
  void call_each(const uint32_t* function, uint32_t site);
  void return_lanes();  ///< exec lanes return
  void exit_lanes();    ///< exec lanes end
  void yield() { stop = true; }
  /// The current instruction waits for the other lanes of `members`; it will be
  /// executed again when more lanes have arrived.
  void wait_for_lanes();
  /// Whether lanes outside the running group can make progress by themselves.
  bool others_ready() const;
  /// exec lanes wait at a barrier and go on behind it.
  void wait_at_barrier(uint8_t id);
  /// Makes the lanes that wait at barrier `id` ready.
  void release_barrier(uint8_t id);
  uint32_t lanes_at_barrier(uint8_t id) const;
  std::vector<LaneGroup> positions() const;  ///< for messages
  const Inst& current() const;               ///< the instruction being executed
  uint8_t* frame_at(uint32_t offset) { return registers_.data() + offset; }

 private:
  std::vector<uint8_t> registers_;
  std::vector<LaneGroup> others_;  ///< every group but the running one
  alignas(64) uint8_t special_[kSpecialBankBytes];
  uint32_t merge_pc_ = UINT32_MAX;  ///< nearest pc where another group waits to merge
  uint32_t turn_left_ = 0;          ///< fairness: instructions before another group gets a turn
  bool rotating_ = false;

  LaneGroup running() const;
  void split(uint32_t mask, uint32_t pc);
  void resume(const LaneGroup& g);
  void reschedule();
  void rotate();
  void set_frame(uint32_t frame);
  void reserve_registers(size_t bytes);
  void init_special();
  void enter(uint32_t function, uint32_t site, uint32_t mask, uint32_t return_pc, LaneGroup& out);
};

/// Writes r to d for the lanes in mask.
template <class T>
inline void blend(T* __restrict d, const T* __restrict r, uint32_t mask) {
  if (mask == kAllLanes) {  // not memcpy: the compiler would call it for this size
    constexpr unsigned kVectors = sizeof(T) * kWarpSize / 32;
    __m256i v[kVectors];
    for (unsigned i = 0; i < kVectors; ++i) v[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(r) + i);
    for (unsigned i = 0; i < kVectors; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(d) + i, v[i]);
    return;
  }
  for (uint32_t l = 0; l < kWarpSize; ++l)
    if (mask >> l & 1) d[l] = r[l];
}

/// Calls f(lane) for the lanes in mask, lowest first.
template <class F>
inline void for_lanes(uint32_t mask, F&& f) {
  for (; mask; mask &= mask - 1) f(static_cast<uint32_t>(__builtin_ctz(mask)));
}

}  // namespace ptxsim
