#include "sim/memory.h"

#include <sstream>

#include "check/observer.h"
#include "ptxsim/error.h"
#include "sim/cta.h"
#include "sim/launch.h"

namespace ptxsim {
namespace {

std::string hex(uint64_t v) {
  std::ostringstream s;
  s << "0x" << std::hex << v;
  return s.str();
}

/// Lanes whose address is not a multiple of `bytes` (a power of two).
uint32_t misaligned_lanes(const uint64_t* addr, uint32_t mask, unsigned bytes) {
  uint64_t any = 0;
  for (uint32_t l = 0; l < kWarpSize; ++l) any |= (mask >> l & 1) ? addr[l] : 0;
  if ((any & (bytes - 1)) == 0) return 0;
  uint32_t bad = 0;
  for_lanes(mask, [&](uint32_t l) { bad |= uint32_t{(addr[l] & (bytes - 1)) != 0} << l; });
  return bad;
}

void resolve_shared(Warp& w, const Inst& in, uint32_t mask, unsigned bytes, LaneAddresses& a, uint64_t window) {
  Cta& own = *w.cta;
  const uint64_t base = uint64_t{own.rank} << kSharedRankShift;
  const uint64_t size = own.shared_bytes;
  if (mask == kAllLanes) {
    bool inside = true;
    for (uint32_t l = 0; l < kWarpSize; ++l) {
      const uint64_t offset = a.addr[l] - window - base;
      inside &= (offset >= kReservedShared) & (offset + bytes <= size);
      a.host[l] = own.shared.data() + offset;
    }
    if (inside) return;
  }
  for_lanes(mask, [&](uint32_t l) {
    const uint64_t offset = a.addr[l] - window - base;
    if (offset >= kReservedShared && offset + bytes <= size) [[likely]] {
      a.host[l] = own.shared.data() + offset;
    } else {
      a.host[l] = resolve(w, Space::shared, a.addr[l] - window, bytes, l, in.mem.cluster || window != 0);
    }
  });
}

void resolve_local(Warp& w, uint32_t mask, unsigned bytes, LaneAddresses& a, uint64_t window) {
  for_lanes(mask, [&](uint32_t l) {
    const uint64_t offset = a.addr[l] - window;
    if (offset + bytes > w.local_used) fault(w, l, "local memory access out of bounds at " + hex(offset));
    a.host[l] = w.local_at(l, offset);
  });
}

}  // namespace

Space window_of(uint64_t generic) {
  if (generic < kHostLimit) return Space::global;
  if (in_shared_window(generic)) return Space::shared;
  if (in_local_window(generic)) return Space::local;
  return Space::generic;
}

void fault(const Warp& w, uint32_t lane, const std::string& what) {
  const Cta& cta = *w.cta;
  const Dim3& b = w.launch->block;
  const uint32_t t = w.index * kWarpSize + lane;
  fail(what, "\n  at ", w.program->where(static_cast<uint32_t>(&w.current() - w.program->code.data())), "\n  block (",
       cta.id.x, ",", cta.id.y, ",", cta.id.z, ") thread (", t % b.x, ",", t / b.x % b.y, ",", t / b.x / b.y, ") warp ",
       w.index, " lane ", lane);
}

uint8_t* resolve(Warp& w, Space space, uint64_t addr, uint64_t bytes, uint32_t lane, bool cluster) {
  if (space == Space::generic) {
    space = window_of(addr);
    if (space == Space::shared) addr -= kSharedWindow;
    if (space == Space::local) addr -= kLocalWindow;
    if (space == Space::generic) fault(w, lane, "invalid generic address " + hex(addr));
    cluster = true;
  }
  switch (space) {
    case Space::shared: {
      const uint64_t rank = addr >> kSharedRankShift;
      const uint64_t offset = addr & ((1u << kSharedRankShift) - 1);
      Cluster& c = *w.cta->cluster;
      if (rank >= c.ctas.size() || (rank != w.cta->rank && !cluster))
        fault(w, lane, "shared memory address " + hex(addr) + " is not of this CTA");
      Cta& owner = *c.ctas[rank];
      if (offset < kReservedShared || offset + bytes > owner.shared_bytes)
        fault(w, lane,
              "shared memory access out of bounds: offset " +
                  std::to_string(static_cast<int64_t>(offset) - kReservedShared) + " + " + std::to_string(bytes) +
                  " of " + std::to_string(owner.shared_bytes - kReservedShared) + " bytes");
      return owner.shared.data() + offset;
    }
    case Space::local:
      if (addr + bytes > w.local_used) fault(w, lane, "local memory access out of bounds at " + hex(addr));
      return w.local_at(lane, addr);
    default:
      if (addr >= kHostLimit || addr < 4096) fault(w, lane, "invalid global address " + hex(addr));
      return reinterpret_cast<uint8_t*>(addr);
  }
}

void effective_addresses(const Warp& w, const Inst& in, const Operand& base, uint64_t* addr) {
  const auto disp = static_cast<uint64_t>(in.disp);
  if (base.bytes == 8) {
    const auto* p = w.src<uint64_t>(base);
    for (uint32_t l = 0; l < kWarpSize; ++l) addr[l] = p[l] + disp;
  } else {
    const auto* p = w.src<uint32_t>(base);
    for (uint32_t l = 0; l < kWarpSize; ++l) addr[l] = static_cast<uint32_t>(p[l] + disp);
  }
}

void lane_addresses(Warp& w, const Inst& in, const Operand& base, AccessKind kind, LaneAddresses& a) {
  effective_addresses(w, in, base, a.addr);
  const unsigned bytes = in.mem.elem_bytes * in.mem.vec;
  if (const uint32_t bad = misaligned_lanes(a.addr, w.exec, bytes)) {
    const auto l = static_cast<uint32_t>(__builtin_ctz(bad));
    fault(w, l, "misaligned access of " + std::to_string(bytes) + " bytes at " + hex(a.addr[l]));
  }
  if (in.mem.space != Space::shared && (in.mem.volatile_or_relaxed || kind == AccessKind::atomic))
    note_strong_access(w);  // may be a wait for another CTA
  switch (in.mem.space) {
    case Space::shared:
      resolve_shared(w, in, w.exec, bytes, a, 0);
      break;
    case Space::local:
      resolve_local(w, w.exec, bytes, a, 0);
      break;
    case Space::generic: {
      uint32_t shared = 0, local = 0, global = 0;
      for_lanes(w.exec, [&](uint32_t l) {
        if (a.addr[l] < kHostLimit)
          global |= 1u << l;
        else if (in_shared_window(a.addr[l]))
          shared |= 1u << l;
        else if (in_local_window(a.addr[l]))
          local |= 1u << l;
        else
          fault(w, l, "invalid generic address " + hex(a.addr[l]));
      });
      for_lanes(global, [&](uint32_t l) { a.host[l] = reinterpret_cast<uint8_t*>(a.addr[l]); });
      if (shared) resolve_shared(w, in, shared, bytes, a, kSharedWindow);
      if (local) resolve_local(w, local, bytes, a, kLocalWindow);
      if (w.launch->observe) [[unlikely]] {
        if (global) observe(w, in, Space::global, kind, global, bytes, a);
        if (shared) observe(w, in, Space::shared, kind, shared, bytes, a);
        if (local) observe(w, in, Space::local, kind, local, bytes, a);
      }
      return;
    }
    default:
      for (uint32_t l = 0; l < kWarpSize; ++l) a.host[l] = reinterpret_cast<uint8_t*>(a.addr[l]);
      break;
  }
  if (w.launch->observe) [[unlikely]]
    observe(w, in, in.mem.space, kind, w.exec, bytes, a);
}

}  // namespace ptxsim
