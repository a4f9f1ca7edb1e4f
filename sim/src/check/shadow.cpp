#include "check/shadow.h"

#include <algorithm>
#include <string>

#include "sim/cta.h"

namespace ptxsim {

SharedShadow::SharedShadow(Cta& cta)
    : cta_(cta),
      race_(cta.launch->options.racecheck != RaceCheck::off),
      init_(cta.launch->options.initcheck),
      warps_(static_cast<uint32_t>(cta.warps.size())) {
  if (init_) written_.assign(cta.shared_bytes, 0);
  if (!race_) return;
  clock_.assign(warps_, Clock(warps_, 0));
  for (uint32_t w = 0; w < warps_; ++w) clock_[w][w] = 1;
  barrier_clock_.assign(16, Clock(warps_, 0));
  last_write_.assign(cta.shared_bytes, {});
  last_read_.assign(size_t{cta.shared_bytes} * warps_, {});
}

void SharedShadow::join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void SharedShadow::barrier_arrived(Warp& w, uint32_t id) {
  if (!race_) return;
  join(barrier_clock_[id], clock_[w.index]);
  ++clock_[w.index][w.index];
  ++w.sync_epoch;
}

void SharedShadow::barrier_completed(uint32_t id) {
  if (!race_) return;
  for (const auto& w : cta_.warps)
    if (w->lanes_at_barrier(static_cast<uint8_t>(id))) join(clock_[w->index], barrier_clock_[id]);
  barrier_clock_[id].assign(warps_, 0);
}

void SharedShadow::release(Warp& w, const uint8_t* object) {
  if (!race_) return;
  auto [it, fresh] = object_clock_.try_emplace(object, Clock(warps_, 0));
  join(it->second, clock_[w.index]);
  ++clock_[w.index][w.index];
}

void SharedShadow::acquire(Warp& w, const uint8_t* object) {
  if (!race_) return;
  auto it = object_clock_.find(object);
  if (it != object_clock_.end()) join(clock_[w.index], it->second);
}

bool SharedShadow::ordered(const Warp& w, uint32_t lane, const Access& before) const {
  if (before.clock == 0) return true;
  if (before.warp != w.index) return before.clock <= clock_[w.index][before.warp];
  return before.lane == lane || before.epoch != w.sync_epoch || before.instruction == instruction_;
}

void SharedShadow::report(const Warp& w, uint32_t lane, const char* hazard, const Access& before,
                          uint64_t offset) const {
  fault(w, lane,
        "racecheck: " + std::string(hazard) + " hazard on shared memory offset " +
            std::to_string(offset - kReservedShared) + ": no barrier orders this access behind that of warp " +
            std::to_string(before.warp) + " lane " + std::to_string(before.lane) + "\n  at " +
            w.program->where(before.pc) + "\n  and this access");
}

void SharedShadow::check_race(Warp& w, AccessKind kind, bool atomic, uint32_t lane, uint64_t offset) {
  Access now;
  now.clock = clock_[w.index][w.index];
  now.epoch = w.sync_epoch;
  now.instruction = instruction_;
  now.pc = w.pc - 1;
  now.warp = static_cast<uint16_t>(w.index);
  now.lane = static_cast<uint8_t>(lane);
  now.atomic = atomic;
  const Access& write = last_write_[offset];
  if (!(atomic && write.atomic) && !ordered(w, lane, write))
    report(w, lane, kind == AccessKind::load ? "read-after-write" : "write-after-write", write, offset);
  Access* reads = &last_read_[offset * warps_];
  if (kind == AccessKind::load) {
    reads[w.index] = now;
    return;
  }
  for (uint32_t r = 0; r < warps_; ++r)
    if (!(atomic && reads[r].atomic) && !ordered(w, lane, reads[r]))
      report(w, lane, "write-after-read", reads[r], offset);
  last_write_[offset] = now;
}

void SharedShadow::access(Warp& w, AccessKind kind, Order order, uint32_t lane, const uint8_t* host, uint64_t bytes) {
  const uint8_t* begin = cta_.shared.data();
  if (host < begin || host + bytes > begin + cta_.shared_bytes) return;  // another CTA's
  const auto first = static_cast<uint64_t>(host - begin);
  if (order == Order::strong) acquire(w, host);
  for (uint64_t offset = first; offset < first + bytes; ++offset) {
    if (init_) {
      if (kind != AccessKind::store && !written_[offset])
        fault(w, lane,
              "initcheck: read of uninitialised shared memory at offset " + std::to_string(offset - kReservedShared));
      if (kind != AccessKind::load) written_[offset] = 1;
    }
    if (race_) check_race(w, kind, order != Order::plain, lane, offset);
  }
  if (order == Order::strong) release(w, host);
}

}  // namespace ptxsim
