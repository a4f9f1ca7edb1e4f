// ld and st in every space, scalar and vector.
#include "check/shadow.h"
#include "ops/lanes.h"
#include "ops/space.h"
#include "ops/table.h"
#include "sim/cta.h"
#include "sim/memory.h"

namespace ptxsim {

void decode_store_async(Decode& d);  // cluster.cpp

namespace {

struct Quad {
  uint64_t lo, hi;
};

// Memory type M, register type R (as wide or wider: the value is extended).
template <class M, class R>
void exec_load(Warp& w, const Inst& in) {
  LaneAddresses a;
  const unsigned vec = in.mem.vec;
  lane_addresses(w, in, in.op[vec], AccessKind::load, a);
  for (unsigned v = 0; v < vec; ++v) {
    R* d = w.dst<R>(in.op[v]);
    for_lanes(w.exec, [&](uint32_t l) {
      M value;
      std::memcpy(&value, a.host[l] + v * sizeof(M), sizeof(M));
      if constexpr (std::is_same_v<M, R>)
        d[l] = value;
      else
        d[l] = static_cast<R>(value);
    });
  }
}

template <class M, class R>
void exec_store(Warp& w, const Inst& in) {
  LaneAddresses a;
  const unsigned vec = in.mem.vec;
  lane_addresses(w, in, in.op[vec], AccessKind::store, a);
  for (unsigned v = 0; v < vec; ++v) {
    const R* s = w.src<R>(in.op[v]);
    for_lanes(w.exec, [&](uint32_t l) {
      M value;
      if constexpr (std::is_same_v<M, R>)
        value = s[l];
      else
        value = static_cast<M>(s[l]);
      std::memcpy(a.host[l] + v * sizeof(M), &value, sizeof(M));
    });
  }
  if (SharedShadow* shadow = w.cta->shadow.get()) shadow->settle(w);
}

/// Kernel parameters at a constant offset: one value for all lanes.
template <class M, class R>
void exec_load_param(Warp& w, const Inst& in) {
  const auto* p = reinterpret_cast<const uint8_t*>(*w.src<uint64_t>(in.op[in.mem.vec])) + in.disp;
  for (unsigned v = 0; v < in.mem.vec; ++v) {
    M value;
    std::memcpy(&value, p + v * sizeof(M), sizeof(M));
    R* d = w.dst<R>(in.op[v]);
    for_lanes(w.exec, [&](uint32_t l) {
      if constexpr (std::is_same_v<M, R>)
        d[l] = value;
      else
        d[l] = static_cast<R>(value);
    });
  }
}

template <template <class, class> class Exec>
Handler by_width(Type t, unsigned reg) {
  switch (t) {
    case Type::u8:
    case Type::b8:
      return reg == 2   ? Exec<uint8_t, uint16_t>::f
             : reg == 4 ? Exec<uint8_t, uint32_t>::f
             : reg == 8 ? Exec<uint8_t, uint64_t>::f
                        : Exec<uint8_t, uint8_t>::f;
    case Type::s8:
      return reg == 2   ? Exec<int8_t, uint16_t>::f
             : reg == 4 ? Exec<int8_t, uint32_t>::f
             : reg == 8 ? Exec<int8_t, uint64_t>::f
                        : Exec<uint8_t, uint8_t>::f;
    case Type::s16:
      return reg == 2   ? Exec<uint16_t, uint16_t>::f
             : reg == 4 ? Exec<int16_t, uint32_t>::f
                        : Exec<int16_t, uint64_t>::f;
    case Type::u16:
    case Type::b16:
    case Type::f16:
    case Type::bf16:
      return reg == 2   ? Exec<uint16_t, uint16_t>::f
             : reg == 4 ? Exec<uint16_t, uint32_t>::f
                        : Exec<uint16_t, uint64_t>::f;
    case Type::s32:
      return reg == 4 ? Exec<uint32_t, uint32_t>::f : Exec<int32_t, uint64_t>::f;
    case Type::u32:
    case Type::b32:
    case Type::f32:
    case Type::f16x2:
    case Type::bf16x2:
      return reg == 4 ? Exec<uint32_t, uint32_t>::f : Exec<uint32_t, uint64_t>::f;
    case Type::u64:
    case Type::s64:
    case Type::b64:
    case Type::f64:
      return Exec<uint64_t, uint64_t>::f;
    case Type::b128:
      return Exec<Quad, Quad>::f;
    default:
      return nullptr;
  }
}
template <class M, class R>
struct Load {
  static constexpr Handler f = exec_load<M, R>;
};
template <class M, class R>
struct Store {
  static constexpr Handler f = exec_store<M, R>;
};
template <class M, class R>
struct LoadParam {
  static constexpr Handler f = exec_load_param<M, R>;
};
// Quad registers cannot be narrower or wider: by_width never mixes them.

InstClass load_class(Space s) {
  switch (s) {
    case Space::global:
      return InstClass::ld_global;
    case Space::shared:
      return InstClass::ld_shared;
    case Space::local:
      return InstClass::ld_local;
    case Space::param:
      return InstClass::ld_param;
    case Space::constant:
      return InstClass::ld_const;
    default:
      return InstClass::ld_generic;
  }
}
InstClass store_class(Space s) {
  switch (s) {
    case Space::global:
      return InstClass::st_global;
    case Space::shared:
      return InstClass::st_shared;
    case Space::local:
      return InstClass::st_local;
    case Space::param:
      return InstClass::ld_param;
    default:
      return InstClass::st_generic;
  }
}

unsigned take_vector(Decode& d) {
  const auto v = d.pick({"v2", "v4", "v8"});
  return v == "v2" ? 2 : v == "v4" ? 4 : v == "v8" ? 8 : 1;
}

/// Parameters of a device function and of call sites live in the local frame.
Space param_space(Decode& d, size_t address_index) {
  const ast::Operand& a = d.arg(address_index);
  if (a.parts.empty()) return Space::param;
  const ast::Operand& base = a.parts[0];
  const ast::Function& f = d.builder().function();
  if (base.kind == ast::Operand::variable)
    return d.builder().in_kernel() && base.index < f.params.size() ? Space::param : Space::local;
  return d.builder().in_kernel() ? Space::param : Space::local;
}

/// The value registers must all have one width.
unsigned value_operands(Decode& d, const ast::Operand& value, unsigned vec, Type t, bool load) {
  const bool braces = value.kind == ast::Operand::vector;  // Triton writes scalars as {x} too
  if ((braces ? value.parts.size() : 1) != vec) d.unsupported("vector length");
  unsigned width = 0;
  std::vector<Operand> ops;
  auto one = [&](const ast::Operand& o) {
    if (o.kind == ast::Operand::sink) {
      ops.push_back({});
      return;
    }
    const Operand r = load ? d.any_result(o, size_of(t)) : d.any_source(o, t);
    if (width && r.bytes != width) d.unsupported("registers of different sizes in a vector");
    width = r.bytes;
    ops.push_back(r);
  };
  if (braces)
    for (const auto& p : value.parts) one(p);
  else
    one(value);
  if (!width) width = std::max(2u, size_of(t));
  for (Operand& o : ops) d.add(o.present() ? o : d.scratch(width));
  return width;
}

void decode_ld(Decode& d) {
  take_ordering(d);
  Space space = take_space(d);
  if (!d.pick({"unified"}).empty()) d.unsupported("ld.unified");
  const bool policy = take_cache_hints(d);
  const unsigned vec = take_vector(d);
  const Type t = d.type();
  d.expect_count(2u + policy);
  const InstClass klass = load_class(space);
  const bool is_param = space == Space::param;
  if (is_param) space = param_space(d, 1);
  const unsigned width = value_operands(d, d.arg(0), vec, t, true);
  d.address(1, space);
  d.inst.mem.space = space == Space::constant ? Space::global : space;
  d.inst.mem.elem_bytes = static_cast<uint8_t>(size_of(t));
  d.inst.mem.vec = static_cast<uint8_t>(vec);
  const bool broadcast = space == Space::param && d.arg(1).parts[0].kind == ast::Operand::variable;
  d.exec(broadcast ? by_width<LoadParam>(t, width) : by_width<Load>(t, width), klass);
  if (space == Space::param) d.inst.mem.space = Space::param;
  d.finish();
}

void decode_st(Decode& d) {
  if (d.flag("async")) return decode_store_async(d);
  if (d.flag("bulk")) d.unsupported("st.bulk");
  take_ordering(d);
  Space space = take_space(d);
  const bool policy = take_cache_hints(d);
  const unsigned vec = take_vector(d);
  const Type t = d.type();
  d.expect_count(2u + policy);
  const InstClass klass = store_class(space);
  if (space == Space::param) space = param_space(d, 0);
  if (space == Space::param || space == Space::constant) d.unsupported("store to a read-only space");
  const unsigned width = value_operands(d, d.arg(1), vec, t, false);
  d.address(0, space);
  d.inst.mem.space = space;
  d.inst.mem.elem_bytes = static_cast<uint8_t>(size_of(t));
  d.inst.mem.vec = static_cast<uint8_t>(vec);
  d.exec(by_width<Store>(t, width), klass);
  d.finish();
}

/// ldu is a read-only load of uniform data.
void decode_ldu(Decode& d) { decode_ld(d); }

}  // namespace

void register_load_store(OpcodeTable& t) {
  t["ld"] = decode_ld;
  t["ldu"] = decode_ldu;
  t["st"] = decode_st;
}

}  // namespace ptxsim
