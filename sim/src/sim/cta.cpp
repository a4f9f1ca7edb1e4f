#include "sim/cta.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <sstream>

#include "check/shadow.h"
#include "check/traffic.h"
#include "ptxsim/error.h"
#include "sim/memory.h"

namespace ptxsim {
namespace {

constexpr uint32_t kRoundsPerSlice = 64;
// Rounds in which every warp only polled an mbarrier or a cluster barrier
// before the cluster is declared dead. Nothing outside it can wake it.
constexpr uint64_t kIdleRoundsLimit = 50000;
constexpr uint64_t kPollsPerTurn = 32;

std::string describe_waiting(const Cluster& c) {
  std::ostringstream out;
  int listed = 0;
  for (const auto& cta : c.ctas)
    for (const auto& w : cta->warps) {
      if (w->done()) continue;
      for (const LaneGroup& g : w->positions()) {
        if (++listed > 8) return out.str() + "\n  ...";
        const char* why = g.wait == LaneGroup::barrier ? "waits at barrier behind " : "at ";
        const uint32_t at = g.wait == LaneGroup::barrier && g.pc ? g.pc - 1 : g.pc;
        out << "\n  block (" << cta->id.x << "," << cta->id.y << "," << cta->id.z << ") warp " << w->index
            << " lanes 0x" << std::hex << g.mask << std::dec << " " << why << c.launch->program->where(at);
      }
    }
  return out.str();
}

}  // namespace

void note_strong_access(Warp& w) {
  ++w.cta->cluster->strong_accesses;
  if (w.cta->cluster->strong_accesses % kPollsPerTurn == 0) {
    w.stop = true;
    w.polled = true;
  }
}

Worker::Worker() = default;
Worker::~Worker() = default;

// ---- CTA --------------------------------------------------------------------

Cta::Cta() = default;
Cta::~Cta() = default;

void Cta::start() {
  const auto threads = static_cast<uint32_t>(launch->block.count());
  const uint32_t count = launch->warps_per_cta();
  shared_bytes = launch->shared_bytes;
  shared.assign(shared_bytes, 0);
  for (uint32_t i = 0; i < count; ++i) {
    warps.push_back(std::make_unique<Warp>());
    async.push_back(std::make_unique<AsyncQueues>());
    warps.back()->async = async.back().get();
    warps.back()->start(*this, i, std::min(kWarpSize, threads - i * kWarpSize));
  }
  for (NamedBarrier& b : barriers) b.arrived.assign(count, 0);
  if (launch->options.racecheck != RaceCheck::off || launch->options.initcheck)
    shadow = std::make_unique<SharedShadow>(*this);
}

bool Cta::done() const {
  return std::all_of(warps.begin(), warps.end(), [](const auto& w) { return w->done(); });
}

bool Cta::blocked() const {
  return std::none_of(warps.begin(), warps.end(), [](const auto& w) { return !w->done() && w->runnable(); });
}

bool Cta::round(uint32_t round_number) {
  const Options& opt = launch->options;
  std::vector<uint32_t> order(warps.size());
  std::iota(order.begin(), order.end(), 0u);
  if (opt.warp_order == WarpOrder::reverse) std::reverse(order.begin(), order.end());
  if (opt.warp_order == WarpOrder::random) {
    std::mt19937 rng(opt.seed + round_number * 7919u + static_cast<uint32_t>(linear_id) * 104729u);
    std::shuffle(order.begin(), order.end(), rng);
  }
  bool progress = false;
  for (uint32_t i : order) {
    Warp& w = *warps[i];
    if (w.done() || !w.runnable()) continue;
    const uint32_t n = w.run(opt.quantum);
    progress |= n > 0 && !w.polled;
    if (opt.max_warp_instructions && w.executed > opt.max_warp_instructions)
      fault(w, 0, "max_warp_instructions exceeded (endless loop?)");
    if (w.done()) {
      w.async->drain();
      worker->stats.max_local_bytes = std::max<uint64_t>(worker->stats.max_local_bytes, w.local_used);
    }
  }
  return progress;
}

void Cta::barrier_arrive(Warp& w, uint32_t id, uint32_t threads, bool wait) {
  if (id >= 16) fault(w, 0, "barrier number " + std::to_string(id) + " is out of range");
  if (threads % kWarpSize) fault(w, 0, "barrier thread count is not a multiple of the warp size");
  NamedBarrier& b = barriers[id];
  const uint32_t first = static_cast<uint32_t>(__builtin_ctz(w.exec));
  if (b.in_use && b.expected_threads != threads)
    fault(w, first,
          "barrier " + std::to_string(id) + ": arrivals with different thread counts (" +
              std::to_string(b.expected_threads) + " and " + std::to_string(threads) + ")");
  if (b.arrived[w.index] & w.exec)
    fault(w, first, "barrier " + std::to_string(id) + ": a thread arrives twice in one phase");
  b.in_use = true;
  b.expected_threads = threads;
  b.arrived[w.index] |= w.exec;
  if (shadow) shadow->barrier_arrived(w, id);
  if (wait) w.wait_at_barrier(static_cast<uint8_t>(id));
  if (barrier_complete(b)) barrier_release(id);
}

bool Cta::barrier_complete(const NamedBarrier& b) const {
  uint32_t arrived_threads = 0;
  bool all = true;
  for (const auto& w : warps) {
    const uint32_t lanes = b.arrived[w->index];
    const bool here = (w->live() & ~lanes) == 0;
    if (lanes && here) arrived_threads += kWarpSize;
    all &= here;
  }
  return b.expected_threads ? arrived_threads >= b.expected_threads : all;
}

void Cta::barrier_release(uint32_t id) {
  NamedBarrier& b = barriers[id];
  if (shadow) shadow->barrier_completed(id);
  for (const NamedBarrier::Reader& r : b.readers) {
    auto* dst = reinterpret_cast<uint32_t*>(r.warp->frame_at(r.frame) + r.dst.offset);
    const bool all = b.reduction_count == b.reduction_lanes, any = b.reduction_count != 0;
    switch (r.kind) {
      case BarrierReduction::popc:
        for_lanes(r.lanes, [&](uint32_t l) { dst[l] = b.reduction_count; });
        break;
      case BarrierReduction::all:
        *dst = (*dst & ~r.lanes) | (all ? r.lanes : 0);
        break;
      case BarrierReduction::any:
        *dst = (*dst & ~r.lanes) | (any ? r.lanes : 0);
        break;
    }
  }
  b.readers.clear();
  b.reduction_count = b.reduction_lanes = 0;
  b.in_use = false;
  b.expected_threads = 0;
  ++worker->stats.barriers;
  std::fill(b.arrived.begin(), b.arrived.end(), 0u);
  for (auto& w : warps) w->release_barrier(static_cast<uint8_t>(id));
}

void Cta::barrier_recheck() {
  for (uint32_t id = 0; id < 16; ++id)
    if (barriers[id].in_use && barrier_complete(barriers[id])) barrier_release(id);
}

// ---- cluster ------------------------------------------------------------------

uint32_t Cluster::live_lanes() const {
  uint32_t n = 0;
  for (const auto& cta : ctas)
    for (const auto& w : cta->warps) n += static_cast<uint32_t>(__builtin_popcount(w->live()));
  return n;
}

/// barrier.cluster: arrivals of exited threads are not awaited.
void Cluster::barrier_check() {
  uint32_t missing = 0;
  if (barrier_arrived == 0) return;
  for (const auto& cta : ctas)
    for (const auto& w : cta->warps)
      for_lanes(w->live(), [&](uint32_t l) { missing += !w->async->cluster_arrived[l]; });
  if (missing) return;
  barrier_arrived = 0;
  ++barrier_phase;
  for (const auto& cta : ctas)
    for (const auto& w : cta->warps) std::fill_n(w->async->cluster_arrived, kWarpSize, false);
}

bool Cluster::done() const {
  return std::all_of(ctas.begin(), ctas.end(), [](const auto& c) { return c->done(); });
}

bool Cluster::slice() {
  strong_accesses = 0;
  for (uint32_t r = 0; r < kRoundsPerSlice; ++r) {
    bool progress = false;
    const uint64_t updates = mbarrier_updates + barrier_phase;
    for (auto& cta : ctas)
      if (!cta->done()) progress |= cta->round(r);
    if (done()) {
      events.drain();
      return true;
    }
    if (std::all_of(ctas.begin(), ctas.end(), [](const auto& c) { return c->done() || c->blocked(); }))
      fail("deadlock: no warp of the cluster can run (divergent or mismatched barrier?)", describe_waiting(*this));
    if (progress || mbarrier_updates + barrier_phase != updates) {
      idle_rounds = 0;
      continue;
    }
    if (++idle_rounds > kIdleRoundsLimit && strong_accesses == 0)
      fail("deadlock: every warp of the cluster polls a barrier that never completes", describe_waiting(*this));
    if (strong_accesses) return false;  // waits for other CTAs: let them run
  }
  return false;
}

}  // namespace ptxsim
