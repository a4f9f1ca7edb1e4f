// atom and red. Lanes act one after the other, lowest first. Each operation is
// a host atomic, since CTAs run on several host threads.
#include <algorithm>
#include <atomic>

#include "ops/float_lanes.h"
#include "ops/space.h"
#include "ops/table.h"
#include "sim/cta.h"
#include "sim/memory.h"

namespace ptxsim {

void decode_store_async(Decode& d);  // cluster.cpp

namespace {

template <class T, class F>
T update(uint8_t* p, F f) {
  std::atomic_ref<T> cell(*reinterpret_cast<T*>(p));
  T old = cell.load(std::memory_order_relaxed);
  while (!cell.compare_exchange_weak(old, f(old), std::memory_order_acq_rel)) {
  }
  return old;
}

enum class AtomOp : uint8_t { add, min, max, inc, dec, and_, or_, xor_, exch, cas };

template <class T>
T integer_op(AtomOp op, T old, T b) {
  using U = std::make_unsigned_t<T>;
  switch (op) {
    case AtomOp::add:
      return static_cast<T>(static_cast<U>(old) + static_cast<U>(b));
    case AtomOp::min:
      return std::min(old, b);
    case AtomOp::max:
      return std::max(old, b);
    case AtomOp::inc:
      return static_cast<U>(old) >= static_cast<U>(b) ? T{0} : static_cast<T>(old + 1);
    case AtomOp::dec:
      return old == 0 || static_cast<U>(old) > static_cast<U>(b) ? b : static_cast<T>(old - 1);
    case AtomOp::and_:
      return old & b;
    case AtomOp::or_:
      return old | b;
    case AtomOp::xor_:
      return old ^ b;
    default:
      return b;
  }
}

// Operands: destination (or absent), base, b [, c].
template <class T>
void exec_integer(Warp& w, const Inst& in) {
  LaneAddresses a;
  lane_addresses(w, in, in.op[1], AccessKind::atomic, a);
  const auto op = static_cast<AtomOp>(in.variant);
  const T* b = w.src<T>(in.op[2]);
  T old[kWarpSize];
  w.cta->worker->stats.atomic_lanes += static_cast<uint64_t>(__builtin_popcount(w.exec));
  if (op == AtomOp::cas) {
    const T* c = w.src<T>(in.op[3]);
    for_lanes(w.exec, [&](uint32_t l) {
      T expected = b[l];
      std::atomic_ref<T>(*reinterpret_cast<T*>(a.host[l])).compare_exchange_strong(expected, c[l]);
      old[l] = expected;
    });
  } else {
    for_lanes(w.exec,
              [&](uint32_t l) { old[l] = update<T>(a.host[l], [&](T v) { return integer_op<T>(op, v, b[l]); }); });
  }
  if (in.op[0].present()) blend(w.dst<T>(in.op[0]), old, w.exec);
}

float combine(AtomOp op, float a, float b) {
  return op == AtomOp::add ? canonical(a + b) : op == AtomOp::min ? min_number(a, b) : max_number(a, b);
}
double combine(AtomOp op, double a, double b) {
  return op == AtomOp::add ? a + b : op == AtomOp::min ? min_number(a, b) : max_number(a, b);
}
half combine(AtomOp op, half a, half b) { return to_half(combine(op, to_float(a), to_float(b))); }
bfloat combine(AtomOp op, bfloat a, bfloat b) { return to_bfloat(combine(op, to_float(a), to_float(b))); }
half2 combine(AtomOp op, half2 a, half2 b) {
  return pack<half2>(combine(op, low(a), low(b)), combine(op, high(a), high(b)));
}
bfloat2 combine(AtomOp op, bfloat2 a, bfloat2 b) {
  return pack<bfloat2>(combine(op, low(a), low(b)), combine(op, high(a), high(b)));
}

template <class T>
struct BitsOf {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};
template <>
struct BitsOf<half> {
  using type = uint16_t;
};
template <>
struct BitsOf<bfloat> {
  using type = uint16_t;
};

/// Scalars and vectors (each element is atomic by itself).
template <class T>
void exec_float(Warp& w, const Inst& in) {
  using B = typename BitsOf<T>::type;
  LaneAddresses a;
  const unsigned vec = in.mem.vec;
  lane_addresses(w, in, in.op[vec], AccessKind::atomic, a);
  const auto op = static_cast<AtomOp>(in.variant);
  w.cta->worker->stats.atomic_lanes += static_cast<uint64_t>(__builtin_popcount(w.exec));
  for (unsigned v = 0; v < vec; ++v) {
    const T* b = w.src<T>(in.op[vec + 1 + v]);
    B old[kWarpSize];
    for_lanes(w.exec, [&](uint32_t l) {
      old[l] = update<B>(a.host[l] + v * sizeof(T),
                         [&](B bits) { return std::bit_cast<B>(combine(op, std::bit_cast<T>(bits), b[l])); });
    });
    if (in.op[v].present()) blend(w.dst<B>(in.op[v]), old, w.exec);
  }
}

AtomOp take_op(Decode& d) {
  constexpr std::string_view kNames[] = {"add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"};
  for (uint8_t i = 0; i < std::size(kNames); ++i)
    if (d.flag(kNames[i])) return static_cast<AtomOp>(i);
  d.unsupported("atomic operation");
}

void decode_atomic(Decode& d) {
  const bool returns = d.base() == "atom";
  if (d.flag("async")) return decode_store_async(d);
  const auto vector = d.pick({"v2", "v4", "v8"});
  const unsigned vec = vector == "v2" ? 2 : vector == "v4" ? 4 : vector == "v8" ? 8 : 1;
  take_ordering(d);
  d.inst.mem.volatile_or_relaxed = true;
  Space space = take_space(d);
  const AtomOp op = take_op(d);
  d.flag("noftz");
  const bool policy = d.flag("L2::cache_hint");
  const Type t = d.type();
  size_t i = 0;
  auto elements = [&](const ast::Operand& o, auto&& add) {
    if (o.kind != ast::Operand::vector && vec == 1) return add(o);
    if (o.kind != ast::Operand::vector || o.parts.size() != vec) d.unsupported("vector length");
    for (const auto& p : o.parts) add(p);
  };
  auto out = [&](const ast::Operand& o) {
    if (o.kind == ast::Operand::sink)
      d.absent();
    else
      d.add(d.out_of(o, t));
  };
  if (returns)
    elements(d.arg(i++), out);
  else
    for (unsigned v = 0; v < vec; ++v) d.absent();
  d.address(i++, space);
  elements(d.arg(i++), [&](const ast::Operand& o) { d.add(d.in_of(o, t)); });
  if (op == AtomOp::cas) d.in(i++, t);
  d.expect_count(i + policy);
  d.inst.variant = static_cast<uint8_t>(op);
  d.inst.mem.space = space;
  d.inst.mem.elem_bytes = static_cast<uint8_t>(size_of(t));
  d.inst.mem.vec = static_cast<uint8_t>(vec);
  const bool arithmetic = op == AtomOp::add || op == AtomOp::min || op == AtomOp::max;
  Handler h = nullptr;
  switch (t) {
    case Type::f32:
      h = arithmetic ? exec_float<float> : nullptr;
      break;
    case Type::f64:
      h = arithmetic ? exec_float<double> : nullptr;
      break;
    case Type::f16:
      h = arithmetic ? exec_float<half> : nullptr;
      break;
    case Type::bf16:
      h = arithmetic ? exec_float<bfloat> : nullptr;
      break;
    case Type::f16x2:
      h = arithmetic ? exec_float<half2> : nullptr;
      break;
    case Type::bf16x2:
      h = arithmetic ? exec_float<bfloat2> : nullptr;
      break;
    case Type::b16:
    case Type::u16:
      h = exec_integer<uint16_t>;
      break;
    case Type::b32:
    case Type::u32:
      h = exec_integer<uint32_t>;
      break;
    case Type::s32:
      h = exec_integer<int32_t>;
      break;
    case Type::b64:
    case Type::u64:
      h = exec_integer<uint64_t>;
      break;
    case Type::s64:
      h = exec_integer<int64_t>;
      break;
    default:
      d.unsupported("atomic of this type");
  }
  if (vec > 1 && !is_float(t) && t != Type::f16x2 && t != Type::bf16x2) d.unsupported("integer vector atomics");
  d.exec(h, InstClass::atomic);
  d.finish();
}

}  // namespace

void register_atomics(OpcodeTable& t) { t["atom"] = t["red"] = decode_atomic; }

}  // namespace ptxsim
