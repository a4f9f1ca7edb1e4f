// cp.async: per-thread asynchronous copies from global to shared memory.
#include "check/observer.h"
#include "check/shadow.h"
#include "ops/space.h"
#include "ops/table.h"
#include "sim/cta.h"
#include "sim/memory.h"

namespace ptxsim {

void decode_bulk_copy(Decode& d);  // bulk_copy.cpp

namespace {

// Operands: shared base, global base, source size (or absent), ignore predicate (or absent).
// imm[0] = bytes, imm[1..2] = displacement of the source
void exec_cp_async(Warp& w, const Inst& in) {
  LaneAddresses dst, src;
  lane_addresses(w, in, in.op[0], AccessKind::store, dst);
  Inst source = in;
  source.mem.space = Space::global;
  source.disp = static_cast<int64_t>(uint64_t{in.imm[2]} << 32 | in.imm[1]);
  effective_addresses(w, source, in.op[1], src.addr);
  const uint32_t bytes = in.imm[0];
  const uint32_t ignored = in.op[3].present() ? w.predicate(in.op[3]) : 0;
  const auto* size = in.op[2].present() ? w.src<uint32_t>(in.op[2]) : nullptr;
  const bool late = w.launch->options.async == AsyncMode::late;
  // Lanes that read: the others only write zeros.
  uint32_t reading = 0;
  for_lanes(w.exec & ~ignored, [&](uint32_t l) {
    if (size && size[l] > bytes) fault(w, l, "cp.async source size exceeds the copy size");
    if (!size || size[l]) reading |= 1u << l;
    if (src.addr[l] & (bytes - 1) && (!size || size[l])) fault(w, l, "cp.async source is misaligned");
  });
  if (w.launch->observe && reading) {
    const uint32_t all = w.exec;
    for_lanes(reading, [&](uint32_t l) { src.host[l] = reinterpret_cast<uint8_t*>(src.addr[l]); });
    if (!size)
      observe(w, in, Space::global, AccessKind::load, reading, bytes, src);
    else
      for (uint32_t left = reading; left;) {  // lanes of one source size are one request
        const uint32_t n = size[__builtin_ctz(left)];
        uint32_t same = 0;
        for_lanes(left, [&](uint32_t l) { same |= uint32_t{size[l] == n} << l; });
        observe(w, in, Space::global, AccessKind::load, same, n, src);
        left &= ~same;
      }
    w.exec = all;
  }
  CopyQueue::Copy copies[kWarpSize];
  for_lanes(w.exec, [&](uint32_t l) {
    const uint32_t n = ignored >> l & 1 ? 0 : size ? size[l] : bytes;
    w.cta->worker->stats.async_copy_bytes += n;
    copies[l] = {dst.host[l], reinterpret_cast<const uint8_t*>(src.addr[l]), n, bytes};
    if (!late) copies[l].perform();
  });
  if (late) w.async->cp_async.add(w.exec, copies);
}

void exec_commit(Warp& w, const Inst&) {
  if (w.cta->shadow) w.cta->shadow->commit_group(w);
  w.async->cp_async.commit(w.exec);
}
void exec_wait_group(Warp& w, const Inst& in) {
  if (w.cta->shadow) w.cta->shadow->wait_group(w, in.imm[0]);
  w.async->cp_async.wait(w.exec, in.imm[0]);
}
void exec_wait_all(Warp& w, const Inst&) {
  if (w.cta->shadow) w.cta->shadow->wait_all(w);
  w.async->cp_async.drain(w.exec);
}

/// An arrival on the mbarrier when this thread's copies are done. imm[0] = noinc.
void exec_mbarrier_arrive(Warp& w, const Inst& in) {
  LaneAddresses a;
  lane_addresses(w, in, in.op[0], AccessKind::atomic, a);
  const bool late = w.launch->options.async == AsyncMode::late;
  if (w.cta->shadow) w.cta->shadow->wait_all(w);  // whoever waits for the mbarrier has waited for the copies
  for_lanes(w.exec, [&](uint32_t l) {
    Mbarrier m = Mbarrier::load(a.host[l]);
    if (w.cta->shadow) w.cta->shadow->release(w, a.host[l]);
    if (!in.imm[0]) ++m.pending;  // without .noinc the arrival is balanced
    if (late) {
      m.store(a.host[l]);
      auto perform = [copies = w.async->cp_async.take_all(l)] {
        for (const CopyQueue::Copy& c : copies) c.perform();
      };
      w.cta->cluster->events.add(a.host[l], {std::move(perform), 0, 1});
      return;
    }
    if (m.pending == 0) fault(w, l, "mbarrier: more arrivals than expected");
    --m.pending;
    m.try_complete();
    m.store(a.host[l]);
  });
}

void decode_cp(Decode& d) {
  if (d.flag("async")) {
    for (std::string_view m : d.modifiers())
      if (m == "bulk") return decode_bulk_copy(d);
    if (d.flag("commit_group")) {
      d.exec(exec_commit, InstClass::async_copy);
      return d.finish();
    }
    if (d.flag("wait_all")) {
      d.exec(exec_wait_all, InstClass::async_copy);
      return d.finish();
    }
    if (d.flag("wait_group")) {
      d.inst.imm[0] = static_cast<uint32_t>(d.immediate(0));
      d.exec(exec_wait_group, InstClass::async_copy);
      return d.finish();
    }
    if (d.flag("mbarrier")) {
      if (!d.flag("arrive")) d.unsupported();
      d.inst.imm[0] = d.flag("noinc");
      d.inst.mem.space = take_space(d);
      if (d.type() != Type::b64) d.unsupported();
      d.address(0, d.inst.mem.space);
      d.inst.mem.elem_bytes = 8;
      d.exec(exec_mbarrier_arrive, InstClass::async_copy);
      return d.finish();
    }
    // cp.async.{ca,cg}.shared.global [dst], [src], bytes{, src-size}{, ignore}{, policy}
    const bool policy = take_cache_hints(d);
    d.pick({"shared", "shared::cta"});
    if (!d.flag("global")) d.unsupported();
    d.address(0, Space::shared);
    const int64_t dst_disp = d.inst.disp;
    d.address(1, Space::global);
    const auto src_disp = static_cast<uint64_t>(d.inst.disp);
    d.inst.disp = dst_disp;
    d.inst.imm[1] = static_cast<uint32_t>(src_disp);
    d.inst.imm[2] = static_cast<uint32_t>(src_disp >> 32);
    d.inst.imm[0] = static_cast<uint32_t>(d.immediate(2));
    const size_t optional = d.count() - 3 - policy;
    if (optional > 1) d.unsupported();
    const bool ignore = optional && d.arg(3).kind == ast::Operand::reg &&
                        d.builder().function().registers[d.arg(3).index].type == Type::pred;
    if (optional && !ignore)
      d.in(3, Type::u32);
    else
      d.absent();
    if (ignore)
      d.predicate(3);
    else
      d.absent();
    d.inst.mem.space = Space::shared;
    d.inst.mem.elem_bytes = static_cast<uint8_t>(d.inst.imm[0]);
    d.inst.mem.deferred = true;
    d.exec(exec_cp_async, InstClass::async_copy);
    return d.finish();
  }
  d.unsupported();
}

}  // namespace

void register_async_copy(OpcodeTable& t) { t["cp"] = decode_cp; }

}  // namespace ptxsim
