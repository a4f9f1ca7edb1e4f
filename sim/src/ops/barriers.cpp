// CTA barriers, fences and sleeping.
#include <algorithm>
#include <atomic>

#include "ops/table.h"
#include "sim/cta.h"
#include "sim/memory.h"

namespace ptxsim {

void decode_barrier_cluster(Decode&);  // cluster.cpp
void decode_bar_warp(Decode&);         // warp_sync.cpp

namespace {

enum class BarKind : uint8_t { sync, arrive, red };

/// The value all executing lanes agree on.
uint32_t uniform(const Warp& w, const Operand& o, const char* what) {
  const auto* v = w.src<uint32_t>(o);
  const uint32_t first = v[__builtin_ctz(w.exec)];
  for_lanes(w.exec, [&](uint32_t l) {
    if (v[l] != first) fault(w, l, std::string(what) + " differs between lanes");
  });
  return first;
}

/// synccheck: who should take part in the barrier but cannot.
void check_participants(const Warp& w, bool aligned, uint32_t threads) {
  const uint32_t missing = w.populated & ~w.exec;
  if (aligned && missing)
    fault(w, static_cast<uint32_t>(__builtin_ctz(missing)),
          "synccheck: divergent threads in an aligned barrier (this lane has exited or is elsewhere)");
  if (threads) return;
  for (const auto& other : w.cta->warps)
    if (other->exited)
      fault(w, static_cast<uint32_t>(__builtin_ctz(w.exec)),
            "synccheck: barrier of the whole block after threads of warp " + std::to_string(other->index) +
                " have exited");
}

// variant: BarKind | aligned << 4. Operands: barrier, thread count (0 = all).
void exec_bar(Warp& w, const Inst& in) {
  const uint32_t id = uniform(w, in.op[0], "barrier number");
  const uint32_t threads = uniform(w, in.op[1], "barrier thread count");
  const auto kind = static_cast<BarKind>(in.variant & 15);
  const bool aligned = in.variant & 16;
  // Lanes that are merely behind get the chance to come to this barrier.
  if (aligned && w.exec != w.live() && w.exec == w.active && w.others_ready()) return w.wait_for_lanes();
  if (w.launch->options.synccheck) check_participants(w, aligned, threads);
  w.cta->barrier_arrive(w, id, threads, kind != BarKind::arrive);
}

// Operands: result, barrier, count, predicate. imm[0] = reduction, imm[1] = negation.
void exec_bar_red(Warp& w, const Inst& in) {
  const uint32_t id = uniform(w, in.op[1], "barrier number");
  const uint32_t threads = uniform(w, in.op[2], "barrier thread count");
  if (id >= 16) fault(w, 0, "barrier number out of range");
  const uint32_t p = (w.predicate(in.op[3]) ^ in.imm[1]) & w.exec;
  NamedBarrier& b = w.cta->barriers[id];
  b.reduction_count += static_cast<uint32_t>(__builtin_popcount(p));
  b.reduction_lanes += static_cast<uint32_t>(__builtin_popcount(w.exec));
  b.readers.push_back({&w, w.exec, w.frame, in.op[0], static_cast<BarrierReduction>(in.imm[0])});
  w.cta->barrier_arrive(w, id, threads, true);
}

void decode_barrier(Decode& d) {
  if (d.flag("cluster")) return decode_barrier_cluster(d);
  const bool bar = d.base() == "bar";
  d.flag("cta");
  if (bar && d.flag("warp")) return decode_bar_warp(d);
  const auto kind = d.pick({"sync", "arrive", "red"});
  const bool aligned = d.flag("aligned") || bar;
  auto number = [&](size_t i) {
    if (i < d.count())
      d.in(i, Type::u32);
    else
      d.add(d.constant(Type::u32, 0));
  };
  if (kind == "red") {
    const auto op = d.pick({"popc", "and", "or"});
    const Type t = d.type();
    if (op == "popc")
      d.out(0, t);
    else
      d.predicate(0);
    d.in(1, Type::u32);
    const bool counted = d.count() == 4;
    if (counted)
      d.in(2, Type::u32);
    else
      d.add(d.constant(Type::u32, 0));
    bool negated = false;
    d.predicate_in(counted ? 3 : 2, negated);
    d.inst.imm[0] = static_cast<uint32_t>(op == "popc"  ? BarrierReduction::popc
                                          : op == "and" ? BarrierReduction::all
                                                        : BarrierReduction::any);
    d.inst.imm[1] = negated ? kAllLanes : 0;
    d.exec(exec_bar_red, InstClass::barrier);
    return d.finish();
  }
  if (kind.empty()) d.unsupported();
  if (kind == "arrive" && d.count() != 2) d.unsupported("bar.arrive without a thread count");
  number(0);
  number(1);
  d.inst.variant = static_cast<uint8_t>(static_cast<unsigned>(kind == "sync" ? BarKind::sync : BarKind::arrive) |
                                        (aligned ? 16u : 0u));
  d.exec(exec_bar, InstClass::barrier);
  d.finish();
}

/// The simulator's memory is sequentially consistent between warps of a host
/// thread; between host threads a full fence makes it so.
void exec_fence(Warp&, const Inst&) { std::atomic_thread_fence(std::memory_order_seq_cst); }
void decode_fence(Decode& d) {
  if (d.base() == "membar") {
    if (d.pick({"cta", "gl", "sys"}).empty()) {
      if (!d.flag("proxy")) d.unsupported();
      d.next();
    }
  } else {
    const bool proxy = std::find_if(d.modifiers().begin(), d.modifiers().end(),
                                    [](auto m) { return m.substr(0, 5) == "proxy"; }) != d.modifiers().end();
    if (proxy) {
      while (d.more()) d.next();  // proxy fences: one proxy here, or tensormap (see README)
    } else {
      d.pick({"sc", "acq_rel", "acquire", "release"});
      d.pick({"cta", "cluster", "gpu", "sys"});
      d.pick({"mbarrier_init", "sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
      d.pick({"cta", "cluster", "gpu", "sys"});
    }
  }
  d.exec(exec_fence, InstClass::fence);
  d.finish();
}

void exec_nanosleep(Warp& w, const Inst&) {
  ++w.cta->cluster->strong_accesses;
  w.stop = w.polled = true;
}
void decode_nanosleep(Decode& d) {
  d.type();
  d.exec(exec_nanosleep, InstClass::other);
  d.finish();
}

void exec_nothing(Warp&, const Inst&) {}
/// setmaxnreg redistributes registers; griddepcontrol orders dependent grids,
/// which here run one after the other anyway.
void decode_no_effect(Decode& d) {
  while (d.more()) d.next();
  d.exec(exec_nothing, InstClass::other);
  d.finish();
}
void decode_pmevent(Decode& d) { decode_no_effect(d); }

}  // namespace

void register_barriers(OpcodeTable& t) {
  t["bar"] = t["barrier"] = decode_barrier;
  t["membar"] = t["fence"] = decode_fence;
  t["nanosleep"] = decode_nanosleep;
  t["setmaxnreg"] = t["griddepcontrol"] = decode_no_effect;
  t["pmevent"] = decode_pmevent;
}

}  // namespace ptxsim
