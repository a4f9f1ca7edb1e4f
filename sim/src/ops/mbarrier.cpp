// mbarrier objects in shared memory.
#include "check/shadow.h"
#include "ops/space.h"
#include "ops/table.h"
#include "sim/cta.h"
#include "sim/memory.h"

namespace ptxsim {

void complete_tx(Cluster& cluster, uint8_t* mbarrier, uint32_t bytes) {
  Mbarrier m = Mbarrier::load(mbarrier);
  m.tx -= static_cast<int32_t>(bytes);
  m.try_complete();
  m.store(mbarrier);
  ++cluster.mbarrier_updates;
}

namespace {

enum class Op : uint8_t {
  init,
  inval,
  expect_tx,
  complete_tx,
  arrive,
  arrive_expect_tx,
  arrive_drop,
  arrive_drop_expect_tx,
  test_wait,
  test_wait_parity
};

// Operands: destination (or absent), address, count or state (or absent).
// imm[0] bit 0: try_wait (yields when not complete), bit 1: the count is a transaction count
void exec_mbarrier(Warp& w, const Inst& in) {
  LaneAddresses a;
  lane_addresses(w, in, in.op[1], static_cast<Op>(in.variant) == Op::init ? AccessKind::store : AccessKind::atomic, a);
  Cluster& cluster = *w.cta->cluster;
  const auto op = static_cast<Op>(in.variant);
  const Operand &dst = in.op[0], &value = in.op[2];
  uint32_t complete = 0;
  for_lanes(w.exec, [&](uint32_t l) {
    uint8_t* p = a.host[l];
    Mbarrier m = Mbarrier::load(p);
    const uint64_t before = *reinterpret_cast<uint64_t*>(p);
    const uint32_t n = !value.present() ? 1 : value.bytes == 8 ? 0 : w.src<uint32_t>(value)[l];
    auto arrive = [&](uint32_t count) {
      if (count > m.pending) fault(w, l, "mbarrier: more arrivals than the expected count");
      m.pending -= count;
      m.try_complete();
      if (w.cta->shadow) w.cta->shadow->release(w, p);
    };
    switch (op) {
      case Op::init:
        if (n == 0 || n > kMbarrierMaxCount) fault(w, l, "mbarrier.init count out of range");
        m = {n, n, 0, false};
        break;
      case Op::inval:
        m = {};
        break;
      case Op::expect_tx:
        m.tx += static_cast<int32_t>(n);
        break;
      case Op::complete_tx:
        m.tx -= static_cast<int32_t>(n);
        m.try_complete();
        break;
      case Op::arrive:
        arrive(n);
        break;
      case Op::arrive_expect_tx:
        m.tx += static_cast<int32_t>(n);
        arrive(1);
        break;
      case Op::arrive_drop:
        m.expected -= n;
        arrive(n);
        break;
      case Op::arrive_drop_expect_tx:
        m.tx += static_cast<int32_t>(n);
        m.expected -= 1;
        arrive(1);
        break;
      case Op::test_wait:
      case Op::test_wait_parity: {
        const bool parity =
            op == Op::test_wait_parity ? (w.src<uint32_t>(value)[l] & 1) : (w.src<uint64_t>(value)[l] >> 63);
        if (m.expected == 0) fault(w, l, "wait on an mbarrier that is not initialised");
        if (m.phase == parity) {
          cluster.events.deliver_if_complete(p);
          const Mbarrier now = Mbarrier::load(p);
          if (now.phase != m.phase) ++cluster.mbarrier_updates;
          m = now;
        }
        if (m.phase != parity) {
          complete |= 1u << l;
          if (w.cta->shadow) w.cta->shadow->acquire(w, p);
        }
        return;
      }
    }
    m.store(p);
    ++cluster.mbarrier_updates;
    if (dst.present()) w.dst<uint64_t>(dst)[l] = before;
  });
  if (op == Op::test_wait || op == Op::test_wait_parity) {
    w.set_predicate(dst, complete);
    if (complete != w.exec) w.stop = w.polled = true;
  }
}

uint64_t pending_count(uint64_t state) { return state >> 20 & kMbarrierMaxCount; }
void exec_pending_count(Warp& w, const Inst& in) {
  const auto* s = w.src<uint64_t>(in.op[1]);
  auto* d = w.dst<uint32_t>(in.op[0]);
  for_lanes(w.exec, [&](uint32_t l) { d[l] = static_cast<uint32_t>(pending_count(s[l])); });
}

void decode_mbarrier(Decode& d) {
  const auto name = d.pick(
      {"init", "inval", "expect_tx", "complete_tx", "arrive", "arrive_drop", "test_wait", "try_wait", "pending_count"});
  // "arrive.expect_tx": flag order lets expect_tx be found first.
  const bool arrives = d.flag("arrive"), drops = d.flag("arrive_drop");
  if (name == "pending_count") {
    d.type();
    d.out(0, Type::b32);
    d.in(1, Type::b64);
    d.exec(exec_pending_count, InstClass::barrier);
    return d.finish();
  }
  const bool with_tx = name == "expect_tx" && (arrives || drops);
  if (d.flag("noComplete")) d.unsupported("mbarrier.arrive.noComplete");
  d.pick({"release", "relaxed", "acquire"});
  d.pick({"cta", "cluster"});
  const bool parity = d.flag("parity");
  d.inst.mem.space = take_space(d);
  d.inst.mem.elem_bytes = 8;
  if (d.type() != Type::b64) d.unsupported();
  const bool waits = name == "test_wait" || name == "try_wait";
  const bool is_arrive = name == "arrive" || name == "arrive_drop" || with_tx;
  size_t i = 0;
  if (is_arrive) {
    if (d.arg(0).kind == ast::Operand::address)
      d.absent();
    else if (d.arg(0).kind == ast::Operand::sink)
      d.absent(), ++i;
    else
      d.add(d.out_of(d.arg(0), Type::b64)), ++i;
  } else if (waits) {
    d.predicate(i++);
  } else {
    d.absent();
  }
  d.address(i++, d.inst.mem.space);
  if (waits) {
    d.in(i++, parity ? Type::b32 : Type::b64);
    if (name == "try_wait" && i < d.count()) ++i;  // the time hint
  } else if (i < d.count()) {
    d.in(i++, Type::b32);
  } else {
    d.absent();
  }
  d.expect_count(i);
  Op op;
  if (waits)
    op = parity ? Op::test_wait_parity : Op::test_wait;
  else if (with_tx)
    op = drops ? Op::arrive_drop_expect_tx : Op::arrive_expect_tx;
  else if (name == "init")
    op = Op::init;
  else if (name == "inval")
    op = Op::inval;
  else if (name == "expect_tx")
    op = Op::expect_tx;
  else if (name == "complete_tx")
    op = Op::complete_tx;
  else if (name == "arrive_drop")
    op = Op::arrive_drop;
  else
    op = Op::arrive;
  d.inst.variant = static_cast<uint8_t>(op);
  d.exec(exec_mbarrier, InstClass::barrier);
  d.finish();
}

}  // namespace

void register_mbarrier(OpcodeTable& t) { t["mbarrier"] = decode_mbarrier; }

}  // namespace ptxsim
