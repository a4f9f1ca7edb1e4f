#include "check/observer.h"

#include <algorithm>
#include <cstring>
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

/// The range that holds an access; remembers the last one, per thread.
const Allocation* allocation_of(uint64_t addr, uint64_t bytes) {
  thread_local std::shared_ptr<Allocation> last;
  thread_local uint64_t version = ~uint64_t{0};
  const uint64_t now = allocations().version();
  if (last && version == now && last->holds(addr, bytes)) return last.get();
  version = now;
  last = allocations().find(addr, bytes);
  return last.get();
}

/// memcheck and initcheck of one lane's access of global memory.
void check_global(Warp& w, AccessKind kind, uint32_t lane, uint64_t addr, uint64_t bytes) {
  const Options& opt = w.launch->options;
  const Allocation* a = allocation_of(addr, bytes);
  if (!a) {
    // Kernel parameters may be read through generic pointers.
    const auto params = reinterpret_cast<uint64_t>(w.launch->params.data());
    if (kind == AccessKind::load && addr >= params && addr + bytes <= params + w.launch->params.size()) return;
    if (!opt.memcheck) return;
    const char* verb = kind == AccessKind::load ? "read" : kind == AccessKind::store ? "write" : "atomic";
    fault(w, lane,
          std::string("memcheck: invalid global ") + verb + " of " + std::to_string(bytes) + " bytes at " + hex(addr) +
              ": " + allocations().describe(addr));
  }
  if (!opt.initcheck || (a->alone && !a->written)) return;
  if (kind != AccessKind::store) {
    const uint8_t* written = a->written.get() + (addr - a->begin);
    const bool ok = a->alone && std::all_of(written, written + bytes, [](uint8_t x) { return x != 0; });
    const uint64_t bad = ok ? addr + bytes : allocations().first_unwritten(addr, bytes);
    if (bad < addr + bytes)
      fault(w, lane, "initcheck: read of uninitialised global memory at " + hex(bad) + " in " + a->name);
  }
  if (kind == AccessKind::load) return;
  if (a->alone)
    std::memset(a->written.get() + (addr - a->begin), 1, bytes);
  else
    allocations().mark_written(reinterpret_cast<const void*>(addr), bytes);
}

void check_global(Warp& w, AccessKind kind, uint32_t mask, uint64_t bytes, const uint64_t* addr) {
  uint64_t low = ~uint64_t{0}, high = 0;
  for_lanes(mask, [&](uint32_t l) { low = std::min(low, addr[l]), high = std::max(high, addr[l]); });
  const Allocation* a = high - low < kHostLimit ? allocation_of(low, high - low + bytes) : nullptr;
  if (a && (!w.launch->options.initcheck || (a->alone && !a->written))) return;
  for_lanes(mask, [&](uint32_t l) { check_global(w, kind, l, addr[l], bytes); });
}

}  // namespace

void observe(Warp& w, const Inst& in, Space space, AccessKind kind, uint32_t mask, unsigned bytes,
             const LaneAddresses& a) {
  const Options& opt = w.launch->options;
  Worker& worker = *w.cta->worker;
  if (space == Space::global) {
    if (opt.memcheck || opt.initcheck) check_global(w, kind, mask, bytes, a.addr);
    if (worker.traffic) worker.traffic->global(worker.stats, kind, mask, bytes, a.addr);
  } else if (space == Space::shared) {
    if (worker.traffic) worker.traffic->shared(worker.stats, kind, mask, bytes, a.addr);
    if (SharedShadow* shadow = w.cta->shadow.get()) {
      using Order = SharedShadow::Order;
      const bool stores_now = in.klass == InstClass::st_shared || in.klass == InstClass::st_generic;
      // mbarrier operations tell the shadow themselves whether they release or acquire.
      const bool mbarrier = in.klass == InstClass::barrier || in.klass == InstClass::async_copy;
      Order order = Order::plain;
      if (kind == AccessKind::atomic || in.mem.volatile_or_relaxed)
        order = mbarrier ? Order::atomic : Order::strong;
      else if (in.mem.deferred && kind == AccessKind::store)
        order = Order::async;
      shadow->access(w, kind, order, mask, a.host, bytes, stores_now);
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
    uint8_t* hosts[kWarpSize] = {};
    hosts[lane] = host;
    w.cta->shadow->access(w, kind, SharedShadow::Order::plain, 1u << lane, hosts, bytes);
  }
}

}  // namespace ptxsim
