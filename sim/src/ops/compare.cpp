// setp, set, selp, slct.
#include "ops/float_lanes.h"
#include "ops/table.h"

namespace ptxsim {
namespace {

enum class Cmp : uint8_t { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };
constexpr std::string_view kCmpNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                          "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

template <Cmp C, class T>
bool compare(T a, T b) {
  switch (C) {
    case Cmp::eq:
      return a == b;
    case Cmp::ne:
      return (a < b) | (a > b);  // ordered, unlike C's !=
    case Cmp::lt:
      return a < b;
    case Cmp::le:
      return a <= b;
    case Cmp::gt:
      return a > b;
    case Cmp::ge:
      return a >= b;
    case Cmp::equ:
      return !((a < b) | (a > b));
    case Cmp::neu:
      return !(a == b);
    case Cmp::ltu:
      return !(a >= b);
    case Cmp::leu:
      return !(a > b);
    case Cmp::gtu:
      return !(a <= b);
    case Cmp::geu:
      return !(a < b);
    case Cmp::num:
      return (a == a) & (b == b);
    case Cmp::nan:
      return (a != a) | (b != b);
  }
}
template <Cmp C>
bool compare(half a, half b) {
  return compare<C>(to_float(a), to_float(b));
}
template <Cmp C>
bool compare(bfloat a, bfloat b) {
  return compare<C>(to_float(a), to_float(b));
}

enum class BoolOp : uint8_t { none, and_, or_, xor_ };

uint32_t combine(const Warp& w, const Inst& in, uint32_t r, const Operand& c) {
  const uint32_t other = static_cast<BoolOp>(in.imm[0]) == BoolOp::none ? 0 : w.predicate(c) ^ in.imm[1];
  switch (static_cast<BoolOp>(in.imm[0])) {
    case BoolOp::and_:
      return r & other;
    case BoolOp::or_:
      return r | other;
    case BoolOp::xor_:
      return r ^ other;
    case BoolOp::none:
      break;
  }
  return r;
}

template <class T, Cmp C, bool Ftz>
bool compare_lane(T a, T b) {
  if constexpr (Ftz)
    return compare<C>(flush(a), flush(b));
  else
    return compare<C>(a, b);
}
template <class T, Cmp C, bool Ftz>
uint32_t compare_lanes(const Warp& w, const Inst& in) {
  return test<compare_lane<T, C, Ftz>, T>(w.src<T>(in.op[2]), w.src<T>(in.op[3]));
}

// Operands: p, q, a, b [, c]. q takes the combination of the complement.
template <class T, Cmp C, bool Ftz>
void exec_setp(Warp& w, const Inst& in) {
  const uint32_t r = compare_lanes<T, C, Ftz>(w, in);
  const Operand& c = in.op[in.n_op - 1];
  const uint32_t p = combine(w, in, r, c), q = combine(w, in, ~r, c);
  w.set_predicate(in.op[0], p);
  w.set_predicate(in.op[1], q);
}

/// set: imm[2] (all ones, or 1.0 of the result type) where true. Operands: d, -, a, b [, c].
template <class T, Cmp C, bool Ftz>
void exec_set(Warp& w, const Inst& in) {
  const uint32_t r = combine(w, in, compare_lanes<T, C, Ftz>(w, in), in.op[in.n_op - 1]);
  if (in.op[0].bytes == 2) {
    auto* d = w.dst<uint16_t>(in.op[0]);
    for_lanes(w.exec, [&](uint32_t l) { d[l] = static_cast<uint16_t>(r >> l & 1 ? in.imm[2] : 0); });
  } else {
    auto* d = w.dst<uint32_t>(in.op[0]);
    for_lanes(w.exec, [&](uint32_t l) { d[l] = r >> l & 1 ? in.imm[2] : 0; });
  }
}

/// Packed halves: p for the low, q for the high element.
template <class P, Cmp C>
void exec_setp_packed(Warp& w, const Inst& in) {
  const P *a = w.src<P>(in.op[2]), *b = w.src<P>(in.op[3]);
  uint32_t lo = 0, hi = 0;
  for_lanes(w.exec, [&](uint32_t l) {
    lo |= uint32_t{compare<C>(low(a[l]), low(b[l]))} << l;
    hi |= uint32_t{compare<C>(high(a[l]), high(b[l]))} << l;
  });
  const Operand& c = in.op[in.n_op - 1];
  const uint32_t p = combine(w, in, lo, c), q = combine(w, in, hi, c);
  w.set_predicate(in.op[0], p);
  w.set_predicate(in.op[1], q);
}
/// set of packed halves: per half, all ones or 1.0 (variant 1 f16, 2 bf16, 0 integer).
template <class P, Cmp C>
void exec_set_packed(Warp& w, const Inst& in) {
  const P *a = w.src<P>(in.op[2]), *b = w.src<P>(in.op[3]);
  auto* d = w.dst<uint32_t>(in.op[0]);
  const uint32_t yes = in.variant == 1 ? 0x3c00 : in.variant == 2 ? 0x3f80 : 0xffff;
  for_lanes(w.exec, [&](uint32_t l) {
    d[l] = (compare<C>(low(a[l]), low(b[l])) ? yes : 0) | (compare<C>(high(a[l]), high(b[l])) ? yes << 16 : 0);
  });
}

template <class T, bool Ftz, template <class, Cmp, bool> class Exec>
Handler by_cmp(Cmp c) {
  switch (c) {
#define C(x)   \
  case Cmp::x: \
    return Exec<T, Cmp::x, Ftz>::f;
    C(eq) C(ne) C(lt) C(le) C(gt) C(ge) C(equ) C(neu) C(ltu) C(leu) C(gtu) C(geu) C(num) C(nan)
#undef C
  }
  return nullptr;
}
template <class T, Cmp C, bool Ftz>
struct Setp {
  static constexpr Handler f = exec_setp<T, C, Ftz>;
};
template <class T, Cmp C, bool Ftz>
struct Set {
  static constexpr Handler f = exec_set<T, C, Ftz>;
};
template <class T, Cmp C, bool>
struct SetpPacked {
  static constexpr Handler f = exec_setp_packed<T, C>;
};
template <class T, Cmp C, bool>
struct SetPacked {
  static constexpr Handler f = exec_set_packed<T, C>;
};

template <template <class, Cmp, bool> class Exec>
Handler by_type(Type t, Cmp c, bool ftz) {
  switch (t) {
    case Type::b16:
    case Type::u16:
      return by_cmp<uint16_t, false, Exec>(c);
    case Type::b32:
    case Type::u32:
      return by_cmp<uint32_t, false, Exec>(c);
    case Type::b64:
    case Type::u64:
      return by_cmp<uint64_t, false, Exec>(c);
    case Type::s16:
      return by_cmp<int16_t, false, Exec>(c);
    case Type::s32:
      return by_cmp<int32_t, false, Exec>(c);
    case Type::s64:
      return by_cmp<int64_t, false, Exec>(c);
    case Type::f32:
      return ftz ? by_cmp<float, true, Exec>(c) : by_cmp<float, false, Exec>(c);
    case Type::f64:
      return by_cmp<double, false, Exec>(c);
    case Type::f16:
      return ftz ? by_cmp<half, true, Exec>(c) : by_cmp<half, false, Exec>(c);
    case Type::bf16:
      return by_cmp<bfloat, false, Exec>(c);
    default:
      return nullptr;
  }
}

Cmp comparison(Decode& d, Type) {
  const std::string_view name = d.next();
  // Unsigned spellings of the integer comparisons: lo, ls, hi, hs.
  if (name == "lo") return Cmp::lt;
  if (name == "ls") return Cmp::le;
  if (name == "hi") return Cmp::gt;
  if (name == "hs") return Cmp::ge;
  for (size_t i = 0; i < std::size(kCmpNames); ++i)
    if (kCmpNames[i] == name) return static_cast<Cmp>(i);
  d.unsupported("comparison " + std::string(name));
}

void boolean(Decode& d, BoolOp& op) {
  const auto name = d.pick({"and", "or", "xor"});
  op = name == "and" ? BoolOp::and_ : name == "or" ? BoolOp::or_ : name == "xor" ? BoolOp::xor_ : BoolOp::none;
  d.inst.imm[0] = static_cast<uint32_t>(op);
}

void comparison_inputs(Decode& d, Type t, BoolOp op) {
  d.in(1, t);
  d.in(2, t);
  d.expect_count(op == BoolOp::none ? 3 : 4);
  if (op == BoolOp::none) return;
  bool negated = false;
  d.predicate_in(3, negated);
  d.inst.imm[1] = negated ? kAllLanes : 0;
}

void decode_setp(Decode& d) {
  const Cmp c = comparison(d, Type::none);
  const bool ftz = d.flag("ftz");
  BoolOp op;
  boolean(d, op);
  const Type t = d.type();
  d.predicate(0);
  if (d.arg(0).second.empty())
    d.absent();
  else
    d.add(d.predicate_of(d.arg(0).second[0]));
  comparison_inputs(d, t, op);
  if (t == Type::f16x2)
    d.exec(by_cmp<half2, false, SetpPacked>(c), InstClass::predicate);
  else if (t == Type::bf16x2)
    d.exec(by_cmp<bfloat2, false, SetpPacked>(c), InstClass::predicate);
  else
    d.exec(by_type<Setp>(t, c, ftz), InstClass::predicate);
  d.finish();
}

void decode_set(Decode& d) {
  const Cmp c = comparison(d, Type::none);
  const bool ftz = d.flag("ftz");
  BoolOp op;
  boolean(d, op);
  const Type to = d.type(), t = d.type();
  if (size_of(to) != 4 && size_of(to) != 2) d.unsupported("set with a result of this size");
  d.out(0, to);
  d.absent();
  comparison_inputs(d, t, op);
  if (t == Type::f16x2 || t == Type::bf16x2) {
    if (op != BoolOp::none) d.unsupported();
    d.inst.variant = to == Type::f16x2 ? 1 : to == Type::bf16x2 ? 2 : 0;
    d.exec(t == Type::f16x2 ? by_cmp<half2, false, SetPacked>(c) : by_cmp<bfloat2, false, SetPacked>(c),
           InstClass::fp16);
  } else {
    d.inst.imm[2] = to == Type::f32 ? 0x3f800000u : to == Type::f16 ? 0x3c00u : to == Type::bf16 ? 0x3f80u : ~0u;
    d.exec(by_type<Set>(t, c, ftz), InstClass::predicate);
  }
  d.finish();
}

template <class T>
void exec_selp(Warp& w, const Inst& in) {
  const T *a = w.src<T>(in.op[1]), *b = w.src<T>(in.op[2]);
  const uint32_t p = w.predicate(in.op[3]) ^ in.imm[0];
  T r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l) r[l] = p >> l & 1 ? a[l] : b[l];
  blend(w.dst<T>(in.op[0]), r, w.exec);
}
void decode_selp(Decode& d) {
  const Type t = d.type();
  d.expect_count(4);
  d.out(0, t);
  d.in(1, t);
  d.in(2, t);
  bool negated = false;
  d.predicate_in(3, negated);
  d.inst.imm[0] = negated ? kAllLanes : 0;
  const unsigned n = size_of(t);
  d.exec(n == 2   ? exec_selp<uint16_t>
         : n == 4 ? exec_selp<uint32_t>
         : n == 8 ? exec_selp<uint64_t>
                  : nullptr,
         InstClass::predicate);
  d.finish();
}

template <class T>
T slct_s32(T a, T b, int32_t c) {
  return c >= 0 ? a : b;
}
template <class T>
T slct_f32(T a, T b, float c) {
  return c >= 0 ? a : b;
}
void decode_slct(Decode& d) {
  d.flag("ftz");
  const Type t = d.type(), c = d.type();
  d.expect_count(4);
  d.out(0, t);
  d.in(1, t);
  d.in(2, t);
  d.in(3, c);
  const bool s = c == Type::s32;
  switch (size_of(t)) {
    case 2:
      d.exec(s ? map<slct_s32<uint16_t>, uint16_t, uint16_t, uint16_t, int32_t>
               : map<slct_f32<uint16_t>, uint16_t, uint16_t, uint16_t, float>,
             InstClass::predicate);
      break;
    case 4:
      d.exec(s ? map<slct_s32<uint32_t>, uint32_t, uint32_t, uint32_t, int32_t>
               : map<slct_f32<uint32_t>, uint32_t, uint32_t, uint32_t, float>,
             InstClass::predicate);
      break;
    default:
      d.exec(s ? map<slct_s32<uint64_t>, uint64_t, uint64_t, uint64_t, int32_t>
               : map<slct_f32<uint64_t>, uint64_t, uint64_t, uint64_t, float>,
             InstClass::predicate);
      break;
  }
  d.finish();
}

}  // namespace

void register_compare(OpcodeTable& t) {
  t["setp"] = decode_setp;
  t["set"] = decode_set;
  t["selp"] = decode_selp;
  t["slct"] = decode_slct;
}

}  // namespace ptxsim
