// Thread block clusters: barrier.cluster, mapa, getctarank, st.async, red.async.
#include <array>

#include "check/shadow.h"
#include "ops/lanes.h"
#include "ops/space.h"
#include "ops/table.h"
#include "sim/cta.h"
#include "sim/memory.h"

namespace ptxsim {

void complete_tx(Cluster& cluster, uint8_t* mbarrier, uint32_t bytes);  // mbarrier.cpp

namespace {

void exec_cluster_arrive(Warp& w, const Inst&) {
  Cluster& c = *w.cta->cluster;
  for_lanes(w.exec, [&](uint32_t l) {
    if (w.async->cluster_arrived[l]) fault(w, l, "barrier.cluster.arrive twice without a wait");
    w.async->cluster_arrived[l] = true;
    w.async->cluster_phase[l] = c.barrier_phase;
  });
  if (w.cta->shadow) w.cta->shadow->release(w, reinterpret_cast<const uint8_t*>(&c));
  c.barrier_arrived += static_cast<uint32_t>(__builtin_popcount(w.exec));
  c.barrier_check();
}

/// Polls: the instruction runs again until the phase its lanes arrived in is over.
void exec_cluster_wait(Warp& w, const Inst&) {
  const Cluster& c = *w.cta->cluster;
  bool ready = true;
  for_lanes(w.exec, [&](uint32_t l) { ready &= c.barrier_phase > w.async->cluster_phase[l]; });
  if (ready) {
    if (w.cta->shadow) w.cta->shadow->acquire(w, reinterpret_cast<const uint8_t*>(&c));
    return;
  }
  --w.pc;
  w.stop = w.polled = true;
}

uint32_t map_rank32(uint32_t a, uint32_t rank) {
  return (a & ((1u << kSharedRankShift) - 1)) | rank << kSharedRankShift;
}
uint64_t map_rank64(uint64_t a, uint32_t rank) {
  return (a & ~(0xffull << kSharedRankShift)) | uint64_t{rank} << kSharedRankShift;
}
uint32_t rank_of32(uint32_t a) { return a >> kSharedRankShift; }
uint32_t rank_of64(uint64_t a) { return static_cast<uint32_t>(a >> kSharedRankShift) & 0xff; }

void decode_mapa(Decode& d) {
  d.pick({"shared::cluster"});
  const Type t = d.type();
  d.expect_count(3);
  d.out(0, t);
  d.in(1, t);
  d.in(2, Type::u32);
  d.exec(
      size_of(t) == 8 ? map<map_rank64, uint64_t, uint64_t, uint32_t> : map<map_rank32, uint32_t, uint32_t, uint32_t>,
      InstClass::int_);
  d.finish();
}
void decode_getctarank(Decode& d) {
  d.pick({"shared::cluster"});
  const Type t = d.type();
  d.expect_count(2);
  d.out(0, Type::u32);
  d.in(1, t);
  d.exec(size_of(t) == 8 ? map<rank_of64, uint32_t, uint64_t> : map<rank_of32, uint32_t, uint32_t>, InstClass::int_);
  d.finish();
}

// st.async [a], b, [mbar]: operands base, mbarrier base, values...; imm = displacement of the mbarrier
void exec_store_async(Warp& w, const Inst& in) {
  LaneAddresses a;
  lane_addresses(w, in, in.op[0], AccessKind::store, a);
  Inst barrier = in;
  barrier.disp = static_cast<int32_t>(in.imm[0]);
  uint64_t bar[kWarpSize];
  effective_addresses(w, barrier, in.op[1], bar);
  const bool late = w.launch->options.async == AsyncMode::late;
  Cluster& cluster = *w.cta->cluster;
  for_lanes(w.exec, [&](uint32_t l) {
    uint8_t* mbarrier = resolve(w, Space::shared, bar[l], 8, l, true);
    const unsigned bytes = in.mem.elem_bytes, total = bytes * in.mem.vec;
    uint8_t value[16];
    for (unsigned v = 0; v < in.mem.vec; ++v)
      std::memcpy(value + v * bytes, w.src<uint8_t>(in.op[2 + v]) + l * in.op[2 + v].bytes, bytes);
    std::array<uint8_t, 16> copy;
    std::memcpy(copy.data(), value, 16);
    const bool add = in.variant;
    auto effect = [to = a.host[l], copy, total, bytes, add] {
      if (!add) {
        std::memcpy(to, copy.data(), total);
        return;
      }
      uint64_t x = 0, y = 0;  // red.async.add of integers
      std::memcpy(&x, to, bytes);
      std::memcpy(&y, copy.data(), bytes);
      x += y;
      std::memcpy(to, &x, bytes);
    };
    if (late) {
      cluster.events.add(mbarrier, {effect, total, 0});
    } else {
      effect();
      complete_tx(cluster, mbarrier, total);
    }
  });
}

}  // namespace

void decode_store_async(Decode& d) {
  const bool red = d.base() == "red";
  d.pick({"weak", "relaxed"});
  d.pick({"cluster"});
  d.inst.mem.cluster = true;
  take_space(d);
  if (!d.flag("mbarrier::complete_tx::bytes")) d.unsupported();
  if (red && !d.flag("add")) d.unsupported("only red.async.add");
  const auto vector = d.pick({"v2", "v4"});
  const unsigned vec = vector == "v2" ? 2 : vector == "v4" ? 4 : 1;
  const Type t = d.type();
  if (red && !is_int(t)) d.unsupported();
  d.expect_count(3);
  d.address(2, Space::shared);  // its displacement moves to imm
  d.inst.imm[0] = static_cast<uint32_t>(d.inst.disp);
  const Operand bar = d.take_last();
  d.address(0, Space::shared);
  d.add(bar);
  const ast::Operand& value = d.arg(1);
  if (vec > 1)
    for (const auto& p : value.parts) d.add(d.any_source(p, t));
  else
    d.add(d.any_source(value, t));
  d.inst.variant = red;
  d.inst.mem.space = Space::shared;
  d.inst.mem.elem_bytes = static_cast<uint8_t>(size_of(t));
  d.inst.mem.vec = static_cast<uint8_t>(vec);
  d.exec(exec_store_async, InstClass::async_copy);
  d.finish();
}

void decode_barrier_cluster(Decode& d) {
  const auto what = d.pick({"arrive", "wait"});
  d.pick({"release", "relaxed", "acquire"});
  d.flag("aligned");
  if (what.empty()) d.unsupported();
  d.exec(what == "arrive" ? exec_cluster_arrive : exec_cluster_wait, InstClass::barrier);
  d.finish();
}

void register_cluster(OpcodeTable& t) {
  t["mapa"] = decode_mapa;
  t["getctarank"] = decode_getctarank;
}

}  // namespace ptxsim
