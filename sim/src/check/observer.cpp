#include "check/observer.h"

#include <sstream>

#include "check/allocations.h"
#include "check/shadow.h"
#include "check/traffic.h"
#include "sim/cta.h"

namespace ptxsim {
namespace {

std::string hex(uint64_t v) {
  std::ostringstream s;
  s << "0x" << std::hex << v;
  return s.str();
}

/// memcheck and initcheck of global memory.
void check_global(Warp& w, AccessKind kind, uint32_t lane, uint64_t addr, uint64_t bytes) {
  const Options& opt = w.launch->options;
  thread_local std::shared_ptr<Allocation> cached;
  if (!cached || addr < cached->begin || addr + bytes > cached->end || cached.use_count() < 2)
    cached = allocations().find(addr);
  const char* verb = kind == AccessKind::load ? "read" : kind == AccessKind::store ? "write" : "atomic";
  if (!cached || addr + bytes > cached->end) {
    // Kernel parameters may be read through generic pointers.
    const auto params = reinterpret_cast<uint64_t>(w.launch->params.data());
    if (kind == AccessKind::load && addr >= params && addr + bytes <= params + w.launch->params.size()) return;
    if (!opt.memcheck) return;
    fault(w, lane,
          std::string("memcheck: invalid global ") + verb + " of " + std::to_string(bytes) + " bytes at " + hex(addr) +
              ": " + allocations().describe(addr));
  }
  if (!opt.initcheck || cached->written.empty()) return;
  uint8_t* written = cached->written.data() + (addr - cached->begin);
  if (kind != AccessKind::store)
    for (uint64_t i = 0; i < bytes; ++i)
      if (!written[i])
        fault(w, lane, "initcheck: read of uninitialised global memory at " + hex(addr + i) + " in " + cached->name);
  if (kind != AccessKind::load) std::fill_n(written, bytes, uint8_t{1});
}

}  // namespace

void observe(Warp& w, const Inst& in, Space space, AccessKind kind, uint32_t mask, unsigned bytes,
             const LaneAddresses& a) {
  const Options& opt = w.launch->options;
  Worker& worker = *w.cta->worker;
  if (space == Space::global) {
    if (opt.memcheck || opt.initcheck) for_lanes(mask, [&](uint32_t l) { check_global(w, kind, l, a.addr[l], bytes); });
    if (worker.traffic) worker.traffic->global(worker.stats, kind, mask, bytes, a.addr);
  } else if (space == Space::shared) {
    if (worker.traffic) worker.traffic->shared(worker.stats, kind, mask, bytes, a.addr);
    if (SharedShadow* shadow = w.cta->shadow.get()) {
      // mbarrier operations tell the shadow themselves whether they release or acquire.
      using Order = SharedShadow::Order;
      const bool strong = kind == AccessKind::atomic || in.mem.volatile_or_relaxed;
      const bool mbarrier = in.klass == InstClass::barrier || in.klass == InstClass::async_copy;
      const Order order = !strong ? Order::plain : mbarrier ? Order::atomic : Order::strong;
      shadow->next_instruction();
      for_lanes(mask, [&](uint32_t l) { shadow->access(w, kind, order, l, a.host[l], bytes); });
    }
  }
}

void observe_range(Warp& w, Space space, AccessKind kind, uint32_t lane, uint64_t addr, uint8_t* host, uint64_t bytes) {
  if (!w.launch->observe || !bytes) return;
  const Options& opt = w.launch->options;
  Worker& worker = *w.cta->worker;
  if (space == Space::global) {
    if (opt.memcheck || opt.initcheck) check_global(w, kind, lane, addr, bytes);
    if (worker.traffic) worker.traffic->global_range(worker.stats, kind, addr, bytes);
  } else if (space == Space::shared && w.cta->shadow) {
    w.cta->shadow->next_instruction();
    w.cta->shadow->access(w, kind, SharedShadow::Order::plain, lane, host, bytes);
  }
}

}  // namespace ptxsim
