// Instructions in which the lanes of a warp exchange data: shfl, vote, match,
// redux, bar.warp.sync, activemask, elect.
#include <algorithm>

#include "ops/float_lanes.h"
#include "ops/sync.h"
#include "ops/table.h"
#include "sim/memory.h"

namespace ptxsim {

/// True when every live lane of every executing lane's member mask is here;
/// otherwise the instruction has been put off until they arrive.
bool members_present(Warp& w, const Operand& members) {
  const auto* m = w.src<uint32_t>(members);
  uint32_t needed = 0;
  for_lanes(w.exec, [&](uint32_t l) {
    if (!(m[l] >> l & 1)) fault(w, l, "the executing lane is not in its member mask");
    needed |= m[l];
  });
  if (needed & w.live() & ~w.exec) {
    if (w.active & needed & ~w.exec)
      fault(w, static_cast<uint32_t>(__builtin_ctz(w.active & needed & ~w.exec)),
            "a lane of the member mask is predicated off");
    w.wait_for_lanes();
    return false;
  }
  ++w.sync_epoch;
  return true;
}

bool warp_converged(Warp& w) {
  if (w.exec == w.live()) {
    ++w.sync_epoch;
    return true;
  }
  if (w.active != w.exec)
    fault(w, static_cast<uint32_t>(__builtin_ctz(w.active & ~w.exec)),
          "an .aligned instruction is predicated off for some lanes of the warp");
  w.wait_for_lanes();
  return false;
}

namespace {

/// Calls f(lanes) for each set of executing lanes that share a member mask.
template <class F>
void for_member_sets(const Warp& w, const Operand& members, F&& f) {
  const auto* m = w.src<uint32_t>(members);
  for (uint32_t todo = w.exec; todo;) {
    const uint32_t mask = m[__builtin_ctz(todo)];
    uint32_t set = 0;
    for_lanes(todo, [&](uint32_t l) { set |= uint32_t{m[l] == mask} << l; });
    todo &= ~set;
    f(set);
  }
}

enum class Shfl : uint8_t { up, down, bfly, idx };

// Operands: d, p, a, b, c, membermask
void exec_shfl(Warp& w, const Inst& in) {
  if (!members_present(w, in.op[5])) return;
  const auto *a = w.src<uint32_t>(in.op[2]), *b = w.src<uint32_t>(in.op[3]), *c = w.src<uint32_t>(in.op[4]);
  uint32_t r[kWarpSize] = {}, p = 0;
  for_lanes(w.exec, [&](uint32_t l) {
    const uint32_t bval = b[l] & 31, cval = c[l] & 31, mask = c[l] >> 8 & 31;
    const uint32_t max_lane = (l & mask) | (cval & ~mask), min_lane = l & mask;
    int j = 0;
    bool ok = false;
    switch (static_cast<Shfl>(in.variant)) {
      case Shfl::up:
        j = static_cast<int>(l) - static_cast<int>(bval);
        ok = j >= static_cast<int>(max_lane);
        break;
      case Shfl::down:
        j = static_cast<int>(l + bval);
        ok = j <= static_cast<int>(max_lane);
        break;
      case Shfl::bfly:
        j = static_cast<int>(l ^ bval);
        ok = j <= static_cast<int>(max_lane);
        break;
      case Shfl::idx:
        j = static_cast<int>(min_lane | (bval & ~mask));
        ok = j <= static_cast<int>(max_lane);
        break;
    }
    const uint32_t source = ok ? static_cast<uint32_t>(j) : l;
    r[l] = a[source];
    p |= uint32_t{ok} << l;
  });
  blend(w.dst<uint32_t>(in.op[0]), r, w.exec);
  w.set_predicate(in.op[1], p);
}
void decode_shfl(Decode& d) {
  if (!d.flag("sync")) d.unsupported("shfl without .sync");
  const auto mode = d.pick({"up", "down", "bfly", "idx"});
  if (d.type() != Type::b32) d.unsupported();
  d.expect_count(5);
  d.out(0, Type::b32);
  if (d.arg(0).second.empty())
    d.absent();
  else
    d.add(d.predicate_of(d.arg(0).second[0]));
  for (size_t i = 1; i < 5; ++i) d.in(i, Type::b32);
  d.inst.variant = static_cast<uint8_t>(mode == "up"     ? Shfl::up
                                        : mode == "down" ? Shfl::down
                                        : mode == "bfly" ? Shfl::bfly
                                                         : Shfl::idx);
  d.exec(exec_shfl, InstClass::warp_sync);
  d.finish();
}

enum class Vote : uint8_t { all, any, uni, ballot };
// Operands: d, p, membermask
void exec_vote(Warp& w, const Inst& in) {
  if (!members_present(w, in.op[2])) return;
  const uint32_t p = w.predicate(in.op[1]) ^ in.imm[0];
  uint32_t ballot[kWarpSize] = {}, r = 0;
  for_member_sets(w, in.op[2], [&](uint32_t set) {
    bool v = false;
    switch (static_cast<Vote>(in.variant)) {
      case Vote::all:
        v = (p & set) == set;
        break;
      case Vote::any:
        v = (p & set) != 0;
        break;
      case Vote::uni:
        v = (p & set) == set || (p & set) == 0;
        break;
      case Vote::ballot:
        for_lanes(set, [&](uint32_t l) { ballot[l] = p & set; });
        break;
    }
    if (v) r |= set;
  });
  if (static_cast<Vote>(in.variant) == Vote::ballot)
    blend(w.dst<uint32_t>(in.op[0]), ballot, w.exec);
  else
    w.set_predicate(in.op[0], r);
}
void decode_vote(Decode& d) {
  if (!d.flag("sync")) d.unsupported("vote without .sync");
  const auto mode = d.pick({"all", "any", "uni", "ballot"});
  const Type t = d.type();
  d.expect_count(3);
  if (t == Type::pred)
    d.predicate(0);
  else
    d.out(0, t);
  bool negated = false;
  d.predicate_in(1, negated);
  d.in(2, Type::b32);
  d.inst.imm[0] = negated ? kAllLanes : 0;
  d.inst.variant = static_cast<uint8_t>(mode == "all"   ? Vote::all
                                        : mode == "any" ? Vote::any
                                        : mode == "uni" ? Vote::uni
                                                        : Vote::ballot);
  d.exec(exec_vote, InstClass::warp_sync);
  d.finish();
}

// Operands: d, p, a, membermask; variant: match.all
template <class T>
void exec_match(Warp& w, const Inst& in) {
  if (!members_present(w, in.op[3])) return;
  const T* a = w.src<T>(in.op[2]);
  uint32_t r[kWarpSize] = {}, p = 0;
  for_member_sets(w, in.op[3], [&](uint32_t set) {
    for_lanes(set, [&](uint32_t l) {
      for_lanes(set, [&](uint32_t k) { r[l] |= uint32_t{a[k] == a[l]} << k; });
      if (in.variant) {
        if (r[l] == set)
          p |= 1u << l;
        else
          r[l] = 0;
      }
    });
  });
  blend(w.dst<uint32_t>(in.op[0]), r, w.exec);
  if (in.variant) w.set_predicate(in.op[1], p);
}
void decode_match(Decode& d) {
  const bool all = d.pick({"any", "all"}) == "all";
  if (!d.flag("sync")) d.unsupported();
  const Type t = d.type();
  d.expect_count(3);
  d.out(0, Type::b32);
  if (d.arg(0).second.empty())
    d.absent();
  else
    d.add(d.predicate_of(d.arg(0).second[0]));
  d.in(1, t);
  d.in(2, Type::b32);
  d.inst.variant = all;
  d.exec(size_of(t) == 8 ? exec_match<uint64_t> : exec_match<uint32_t>, InstClass::warp_sync);
  d.finish();
}

enum class Redux : uint8_t { add, min, max, and_, or_, xor_ };
template <class T>
void exec_redux(Warp& w, const Inst& in) {
  if (!members_present(w, in.op[2])) return;
  const T* a = w.src<T>(in.op[1]);
  T r[kWarpSize] = {};
  for_member_sets(w, in.op[2], [&](uint32_t set) {
    const auto first = static_cast<uint32_t>(__builtin_ctz(set));
    T v = a[first];
    for_lanes(set & (set - 1), [&](uint32_t l) {
      switch (static_cast<Redux>(in.variant)) {
        case Redux::add:
          v = static_cast<T>(static_cast<uint32_t>(v) + static_cast<uint32_t>(a[l]));
          break;
        case Redux::min:
          v = std::min(v, a[l]);
          break;
        case Redux::max:
          v = std::max(v, a[l]);
          break;
        case Redux::and_:
          v &= a[l];
          break;
        case Redux::or_:
          v |= a[l];
          break;
        case Redux::xor_:
          v ^= a[l];
          break;
      }
    });
    for_lanes(set, [&](uint32_t l) { r[l] = v; });
  });
  blend(w.dst<T>(in.op[0]), r, w.exec);
}
void decode_redux(Decode& d) {
  if (!d.flag("sync")) d.unsupported();
  constexpr std::string_view kNames[] = {"add", "min", "max", "and", "or", "xor"};
  bool found = false;
  for (uint8_t i = 0; i < 6 && !found; ++i)
    if (d.flag(kNames[i])) d.inst.variant = i, found = true;
  if (!found) d.unsupported();
  const Type t = d.type();
  if (t == Type::f32) d.unsupported("redux of f32 (sm_100)");
  d.expect_count(3);
  d.out(0, t);
  d.in(1, t);
  d.in(2, Type::b32);
  d.exec(t == Type::s32 ? exec_redux<int32_t> : exec_redux<uint32_t>, InstClass::warp_sync);
  d.finish();
}

void exec_activemask(Warp& w, const Inst& in) {
  auto* d = w.dst<uint32_t>(in.op[0]);
  const uint32_t mask = w.exec;
  for_lanes(mask, [&](uint32_t l) { d[l] = mask; });
}
void decode_activemask(Decode& d) {
  d.type();
  d.out(0, Type::b32);
  d.exec(exec_activemask, InstClass::warp_sync);
  d.finish();
}

// elect.sync d|p, membermask: the lowest lane of the mask is elected.
void exec_elect(Warp& w, const Inst& in) {
  if (!members_present(w, in.op[2])) return;
  uint32_t r[kWarpSize] = {}, p = 0;
  for_member_sets(w, in.op[2], [&](uint32_t set) {
    const auto leader = static_cast<uint32_t>(__builtin_ctz(set));
    p |= 1u << leader;
    for_lanes(set, [&](uint32_t l) { r[l] = leader; });
  });
  blend(w.dst<uint32_t>(in.op[0]), r, w.exec);
  w.set_predicate(in.op[1], p);
}
void decode_elect(Decode& d) {
  if (!d.flag("sync")) d.unsupported();
  d.expect_count(2);
  d.out(0, Type::b32);
  if (d.arg(0).second.empty())
    d.absent();
  else
    d.add(d.predicate_of(d.arg(0).second[0]));
  d.in(1, Type::b32);
  d.exec(exec_elect, InstClass::warp_sync);
  d.finish();
}

void exec_bar_warp(Warp& w, const Inst& in) { members_present(w, in.op[0]); }

}  // namespace

void decode_bar_warp(Decode& d) {
  if (!d.flag("sync")) d.unsupported();
  d.expect_count(1);
  d.in(0, Type::b32);
  d.exec(exec_bar_warp, InstClass::warp_sync);
  d.finish();
}

void register_warp_sync(OpcodeTable& t) {
  t["shfl"] = decode_shfl;
  t["vote"] = decode_vote;
  t["match"] = decode_match;
  t["redux"] = decode_redux;
  t["activemask"] = decode_activemask;
  t["elect"] = decode_elect;
}

}  // namespace ptxsim
