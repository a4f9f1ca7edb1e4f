// mov (with packing), cvta, isspacep, and special registers that change.
#include <chrono>

#include "ops/lanes.h"
#include "ops/table.h"
#include "sim/cta.h"
#include "sim/memory.h"

namespace ptxsim {
namespace {

template <class T>
void exec_mov(Warp& w, const Inst& in) {
  blend(w.dst<T>(in.op[0]), w.src<T>(in.op[1]), w.exec);
}
struct Quad {
  uint64_t lo, hi;
};

void exec_mov_pred(Warp& w, const Inst& in) { w.set_predicate(in.op[0], w.predicate(in.op[1]) ^ in.imm[0]); }

/// d = {s0, s1, ...}: elements of imm[0] bytes, lowest first.
void exec_pack(Warp& w, const Inst& in) {
  const unsigned n = in.n_op - 1u, bytes = in.imm[0], total = n * bytes;
  uint8_t r[kWarpSize * 16];
  for (unsigned i = 0; i < n; ++i) {
    const auto* s = w.src<uint8_t>(in.op[1 + i]);
    const unsigned stride = in.op[1 + i].bytes;
    for (uint32_t l = 0; l < kWarpSize; ++l) std::memcpy(r + l * total + i * bytes, s + l * stride, bytes);
  }
  auto* d = w.dst<uint8_t>(in.op[0]);
  for_lanes(w.exec, [&](uint32_t l) { std::memcpy(d + l * total, r + l * total, total); });
}

/// {d0, d1, ...} = s; the source is the last operand.
void exec_unpack(Warp& w, const Inst& in) {
  const unsigned n = in.n_op - 1u, bytes = in.imm[0], total = n * bytes;
  uint8_t s[kWarpSize * 16];
  std::memcpy(s, w.src<uint8_t>(in.op[n]), kWarpSize * total);  // a destination may be the source
  for (unsigned i = 0; i < n; ++i) {
    auto* d = w.dst<uint8_t>(in.op[i]);
    const unsigned stride = in.op[i].bytes;
    for_lanes(w.exec, [&](uint32_t l) {
      uint64_t v = 0;
      std::memcpy(&v, s + l * total + i * bytes, bytes);
      std::memcpy(d + l * stride, &v, stride);
    });
  }
}

// ---- special registers that are not constant -----------------------------------
enum class Dynamic : uint8_t { clock, clock_hi, clock64, globaltimer, globaltimer_lo, globaltimer_hi, zero };
void exec_dynamic(Warp& w, const Inst& in) {
  uint64_t v = 0;
  const auto now = static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch())
          .count());
  switch (static_cast<Dynamic>(in.variant)) {
    case Dynamic::clock:
    case Dynamic::clock64:
      v = now;
      break;
    case Dynamic::clock_hi:
      v = now >> 32;
      break;
    case Dynamic::globaltimer:
    case Dynamic::globaltimer_lo:
      v = now;
      break;
    case Dynamic::globaltimer_hi:
      v = now >> 32;
      break;
    case Dynamic::zero:
      break;
  }
  if (in.op[0].bytes == 8) {
    auto* d = w.dst<uint64_t>(in.op[0]);
    for_lanes(w.exec, [&](uint32_t l) { d[l] = v; });
  } else {
    auto* d = w.dst<uint32_t>(in.op[0]);
    for_lanes(w.exec, [&](uint32_t l) { d[l] = static_cast<uint32_t>(v); });
  }
}

bool decode_dynamic(Decode& d, Type t) {
  const std::string_view name = d.arg(1).name;
  Dynamic which;
  if (name == "%clock")
    which = Dynamic::clock;
  else if (name == "%clock_hi")
    which = Dynamic::clock_hi;
  else if (name == "%clock64")
    which = Dynamic::clock64;
  else if (name == "%globaltimer")
    which = Dynamic::globaltimer;
  else if (name == "%globaltimer_lo")
    which = Dynamic::globaltimer_lo;
  else if (name == "%globaltimer_hi")
    which = Dynamic::globaltimer_hi;
  else
    return false;
  d.inst.variant = static_cast<uint8_t>(which);
  d.out(0, t);
  d.exec(exec_dynamic, InstClass::move);
  d.finish();
  return true;
}

void decode_vector_mov(Decode& d, Type t) {
  const bool unpack = d.arg(0).kind == ast::Operand::vector;
  const auto& parts = unpack ? d.arg(0).parts : d.arg(1).parts;
  const auto n = static_cast<unsigned>(parts.size());
  const unsigned total = size_of(t), bytes = total / n;
  if (bytes * n != total || bytes == 0) d.unsupported("vector size");
  const Type element = bytes == 1 ? Type::b8 : bytes == 2 ? Type::b16 : bytes == 4 ? Type::b32 : Type::b64;
  d.inst.imm[0] = bytes;
  if (unpack) {
    for (const auto& p : parts)
      d.add(p.kind == ast::Operand::sink ? d.scratch(std::max(bytes, 2u)) : d.any_result(p, bytes));
    d.in(1, t);
    d.exec(exec_unpack, InstClass::move);
  } else {
    d.out(0, t);
    for (const auto& p : parts) d.add(d.any_source(p, element));
    d.exec(exec_pack, InstClass::move);
  }
  d.finish();
}

void decode_mov(Decode& d) {
  const Type t = d.type();
  d.expect_count(2);
  if (t == Type::pred) {
    d.add(d.predicate_of(d.arg(0)));
    bool negated = false;
    d.predicate_in(1, negated);
    d.inst.imm[0] = negated ? kAllLanes : 0;
    d.exec(exec_mov_pred, InstClass::predicate);
    return d.finish();
  }
  if (d.arg(0).kind == ast::Operand::vector || d.arg(1).kind == ast::Operand::vector) return decode_vector_mov(d, t);
  if (d.arg(1).kind == ast::Operand::special && decode_dynamic(d, t)) return;
  d.out(0, t);
  d.in(1, t);
  switch (size_of(t)) {
    case 2:
      d.exec(exec_mov<uint16_t>, InstClass::move);
      break;
    case 4:
      d.exec(exec_mov<uint32_t>, InstClass::move);
      break;
    case 8:
      d.exec(exec_mov<uint64_t>, InstClass::move);
      break;
    case 16:
      d.exec(exec_mov<Quad>, InstClass::move);
      break;
    default:
      d.unsupported();
  }
  d.finish();
}

// ---- cvta, isspacep ------------------------------------------------------------------
uint64_t same64(uint64_t a) { return a; }
uint64_t to_shared_window(uint64_t a) { return a | kSharedWindow; }
uint64_t to_local_window(uint64_t a) { return a | kLocalWindow; }
uint64_t from_shared_window(uint64_t a) { return a & (kSharedWindow - 1); }
uint64_t from_local_window(uint64_t a) { return a & (kLocalWindow - 1); }

/// A state-space modifier; "shared::cta" and "shared::cluster" name one window.
Space space_modifier(Decode& d) {
  const auto s =
      d.pick({"global", "const", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry"});
  if (s == "global") return Space::global;
  if (s == "const") return Space::constant;
  if (s.substr(0, 6) == "shared") return Space::shared;
  if (s == "local") return Space::local;
  if (s.substr(0, 5) == "param") return Space::param;
  return Space::generic;
}

void decode_cvta(Decode& d) {
  const bool to = d.flag("to");
  Space space = space_modifier(d);
  const Type t = d.type();
  if (size_of(t) != 8) d.unsupported("only 64-bit addresses");
  d.expect_count(2);
  // In a device function, parameters live in the local frame.
  if (space == Space::param && !d.builder().in_kernel()) space = Space::local;
  const ast::Operand& a = d.arg(1);
  if (a.kind == ast::Operand::variable && d.builder().function().variables[a.index].space == Space::param &&
      !(d.builder().in_kernel() && a.index < d.builder().function().params.size()))
    space = Space::local;
  d.out(0, t);
  d.in(1, t);
  if (space == Space::shared)
    d.exec(to ? map<from_shared_window, uint64_t, uint64_t> : map<to_shared_window, uint64_t, uint64_t>,
           InstClass::move);
  else if (space == Space::local)
    d.exec(to ? map<from_local_window, uint64_t, uint64_t> : map<to_local_window, uint64_t, uint64_t>, InstClass::move);
  else
    d.exec(map<same64, uint64_t, uint64_t>, InstClass::move);
  d.finish();
}

void exec_isspacep(Warp& w, const Inst& in) {
  const auto* a = w.src<uint64_t>(in.op[1]);
  const auto wanted = static_cast<Space>(in.variant);
  const bool own_only = in.imm[0] != 0;
  uint32_t r = 0;
  for_lanes(w.exec, [&](uint32_t l) {
    bool yes = window_of(a[l]) == wanted;
    if (yes && own_only) yes = (a[l] - kSharedWindow) >> kSharedRankShift == w.cta->rank;
    r |= uint32_t{yes} << l;
  });
  w.set_predicate(in.op[0], r);
}
void decode_isspacep(Decode& d) {
  const bool cluster = std::find(d.modifiers().begin(), d.modifiers().end(), "shared::cluster") != d.modifiers().end();
  const Space space = space_modifier(d);
  if (space != Space::global && space != Space::shared && space != Space::local)
    d.unsupported("isspacep of this space");
  d.expect_count(2);
  d.predicate(0);
  d.in(1, Type::u64);
  d.inst.variant = static_cast<uint8_t>(space);
  d.inst.imm[0] = space == Space::shared && !cluster;
  d.exec(exec_isspacep, InstClass::predicate);
  d.finish();
}

void exec_nothing(Warp&, const Inst&) {}

/// Hints without a functional effect.
void decode_hint(Decode& d) {
  const std::string_view base = d.base();
  if (base == "prefetch" || base == "prefetchu" || base == "applypriority" || base == "discard") {
    while (d.more()) d.next();
    d.exec(exec_nothing, InstClass::other);
    return d.finish();
  }
  d.unsupported();
}

/// createpolicy: the policy is opaque and unused.
void decode_createpolicy(Decode& d) {
  while (d.more()) d.next();
  d.out(0, Type::b64);
  d.add(d.constant(Type::b64, 0));
  d.exec(exec_mov<uint64_t>, InstClass::other);
  d.finish();
}

}  // namespace

void register_move(OpcodeTable& t) {
  t["mov"] = decode_mov;
  t["cvta"] = decode_cvta;
  t["isspacep"] = decode_isspacep;
  t["prefetch"] = t["prefetchu"] = t["applypriority"] = t["discard"] = decode_hint;
  t["createpolicy"] = decode_createpolicy;
}

}  // namespace ptxsim
