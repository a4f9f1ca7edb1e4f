// Bitwise logic and shifts.
#include <algorithm>

#include "ops/lanes.h"
#include "ops/table.h"

namespace ptxsim {
namespace {

template <class T>
T and_(T a, T b) {
  return a & b;
}
template <class T>
T or_(T a, T b) {
  return a | b;
}
template <class T>
T xor_(T a, T b) {
  return a ^ b;
}
template <class T>
T not_(T a) {
  return static_cast<T>(~a);
}
template <class T>
T cnot_(T a) {
  return a == 0;
}

// Shift counts beyond the width clamp, unlike in C.
template <class T>
T shl_(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << n);
}
template <class T>
T shr_(T a, uint32_t n) {
  const uint32_t top = 8 * sizeof(T) - 1;
  if (n > top) return a < 0 ? static_cast<T>(~T{0}) : T{0};
  return static_cast<T>(a >> n);
}

uint32_t funnel_left(uint32_t lo, uint32_t hi, uint32_t n) {
  return static_cast<uint32_t>(((uint64_t{hi} << 32 | lo) << n) >> 32);
}
uint32_t funnel_right(uint32_t lo, uint32_t hi, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{hi} << 32 | lo) >> n);
}
uint32_t shf_l_wrap(uint32_t a, uint32_t b, uint32_t c) { return funnel_left(a, b, c & 31); }
uint32_t shf_l_clamp(uint32_t a, uint32_t b, uint32_t c) { return c >= 32 ? a : funnel_left(a, b, c); }
uint32_t shf_r_wrap(uint32_t a, uint32_t b, uint32_t c) { return funnel_right(a, b, c & 31); }
uint32_t shf_r_clamp(uint32_t a, uint32_t b, uint32_t c) { return c >= 32 ? b : funnel_right(a, b, c); }

uint32_t prmt_byte(uint64_t ab, uint32_t selector) {
  const uint32_t byte = static_cast<uint32_t>(ab >> (8 * (selector & 7))) & 0xff;
  if (selector & 8) return byte & 0x80 ? 0xff : 0;  // replicate the sign
  return byte;
}
uint32_t prmt_default(uint32_t a, uint32_t b, uint32_t c) {
  const uint64_t ab = uint64_t{b} << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= prmt_byte(ab, c >> (4 * i) & 15) << (8 * i);
  return r;
}
/// The special modes: byte i of the result is ab byte kPrmt[mode][c & 3][i].
constexpr uint8_t kPrmt[6][4][4] = {
    {{0, 1, 2, 3}, {1, 2, 3, 4}, {2, 3, 4, 5}, {3, 4, 5, 6}},  // f4e
    {{0, 7, 6, 5}, {1, 0, 7, 6}, {2, 1, 0, 7}, {3, 2, 1, 0}},  // b4e
    {{0, 0, 0, 0}, {1, 1, 1, 1}, {2, 2, 2, 2}, {3, 3, 3, 3}},  // rc8
    {{0, 1, 2, 3}, {1, 1, 2, 3}, {2, 2, 2, 3}, {3, 3, 3, 3}},  // ecl
    {{0, 0, 0, 0}, {0, 1, 1, 1}, {0, 1, 2, 2}, {0, 1, 2, 3}},  // ecr
    {{0, 1, 0, 1}, {2, 3, 2, 3}, {0, 1, 0, 1}, {2, 3, 2, 3}},  // rc16
};
template <int Mode>
uint32_t prmt_mode(uint32_t a, uint32_t b, uint32_t c) {
  const uint64_t ab = uint64_t{b} << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= prmt_byte(ab, kPrmt[Mode][c & 3][i]) << (8 * i);
  return r;
}

/// Evaluates the truth table in.imm[0] with a handful of vector operations.
void exec_lop3(Warp& w, const Inst& in) {
  const auto *a = w.src<uint32_t>(in.op[1]), *b = w.src<uint32_t>(in.op[2]), *c = w.src<uint32_t>(in.op[3]);
  uint32_t r[kWarpSize] = {};
  for (uint32_t minterm = 0; minterm < 8; ++minterm) {
    if (!(in.imm[0] >> minterm & 1)) continue;
    const uint32_t na = minterm & 4 ? 0 : ~0u, nb = minterm & 2 ? 0 : ~0u, nc = minterm & 1 ? 0 : ~0u;
    for (uint32_t l = 0; l < kWarpSize; ++l) r[l] |= (a[l] ^ na) & (b[l] ^ nb) & (c[l] ^ nc);
  }
  blend(w.dst<uint32_t>(in.op[0]), r, w.exec);
}

enum class PredOp : uint8_t { and_, or_, xor_, not_ };
void exec_predicate_logic(Warp& w, const Inst& in) {
  const uint32_t a = w.predicate(in.op[1]) ^ in.imm[0];
  const uint32_t b = in.n_op > 2 ? w.predicate(in.op[2]) ^ in.imm[1] : 0;
  uint32_t r = 0;
  switch (static_cast<PredOp>(in.variant)) {
    case PredOp::and_:
      r = a & b;
      break;
    case PredOp::or_:
      r = a | b;
      break;
    case PredOp::xor_:
      r = a ^ b;
      break;
    case PredOp::not_:
      r = ~a;
      break;
  }
  w.set_predicate(in.op[0], r);
}

void decode_predicate_logic(Decode& d, PredOp op, size_t inputs) {
  d.expect_count(inputs + 1);
  d.add(d.predicate_of(d.arg(0)));
  for (size_t i = 1; i <= inputs; ++i) {
    bool negated = false;
    d.predicate_in(i, negated);
    d.inst.imm[i - 1] = negated ? kAllLanes : 0;
  }
  d.inst.variant = static_cast<uint8_t>(op);
  d.exec(exec_predicate_logic, InstClass::predicate);
  d.finish();
}

#define PTXSIM_BITWISE(NAME, F, OP)                                               \
  void NAME(Decode& d) {                                                          \
    const Type t = d.type();                                                      \
    if (t == Type::pred) return decode_predicate_logic(d, OP, 2);                 \
    d.expect_count(3);                                                            \
    d.out(0, t);                                                                  \
    d.in(1, t);                                                                   \
    d.in(2, t);                                                                   \
    switch (size_of(t)) {                                                         \
      case 2:                                                                     \
        d.exec(map<F<uint16_t>, uint16_t, uint16_t, uint16_t>, InstClass::logic); \
        break;                                                                    \
      case 4:                                                                     \
        d.exec(map<F<uint32_t>, uint32_t, uint32_t, uint32_t>, InstClass::logic); \
        break;                                                                    \
      case 8:                                                                     \
        d.exec(map<F<uint64_t>, uint64_t, uint64_t, uint64_t>, InstClass::logic); \
        break;                                                                    \
      default:                                                                    \
        d.unsupported();                                                          \
    }                                                                             \
    d.finish();                                                                   \
  }
PTXSIM_BITWISE(decode_and, and_, PredOp::and_)
PTXSIM_BITWISE(decode_or, or_, PredOp::or_)
PTXSIM_BITWISE(decode_xor, xor_, PredOp::xor_)
#undef PTXSIM_BITWISE

void decode_not(Decode& d) {
  const Type t = d.type();
  if (t == Type::pred) return decode_predicate_logic(d, PredOp::not_, 1);
  d.expect_count(2);
  d.out(0, t);
  d.in(1, t);
  switch (size_of(t)) {
    case 2:
      d.exec(map<not_<uint16_t>, uint16_t, uint16_t>, InstClass::logic);
      break;
    case 4:
      d.exec(map<not_<uint32_t>, uint32_t, uint32_t>, InstClass::logic);
      break;
    default:
      d.exec(map<not_<uint64_t>, uint64_t, uint64_t>, InstClass::logic);
      break;
  }
  d.finish();
}

void decode_cnot(Decode& d) {
  const Type t = d.type();
  d.expect_count(2);
  d.out(0, t);
  d.in(1, t);
  switch (size_of(t)) {
    case 2:
      d.exec(map<cnot_<uint16_t>, uint16_t, uint16_t>, InstClass::logic);
      break;
    case 4:
      d.exec(map<cnot_<uint32_t>, uint32_t, uint32_t>, InstClass::logic);
      break;
    default:
      d.exec(map<cnot_<uint64_t>, uint64_t, uint64_t>, InstClass::logic);
      break;
  }
  d.finish();
}

void decode_shift(Decode& d) {
  const bool left = d.base() == "shl";
  const Type t = d.type();
  d.expect_count(3);
  d.out(0, t);
  d.in(1, t);
  d.in(2, Type::u32);
  const bool arithmetic = is_signed_int(t);
  using U = uint32_t;
  switch (size_of(t)) {
    case 2:
      d.exec(left         ? map<shl_<uint16_t>, uint16_t, uint16_t, U>
             : arithmetic ? map<shr_<int16_t>, int16_t, int16_t, U>
                          : map<shr_<uint16_t>, uint16_t, uint16_t, U>,
             InstClass::logic);
      break;
    case 4:
      d.exec(left         ? map<shl_<uint32_t>, uint32_t, uint32_t, U>
             : arithmetic ? map<shr_<int32_t>, int32_t, int32_t, U>
                          : map<shr_<uint32_t>, uint32_t, uint32_t, U>,
             InstClass::logic);
      break;
    case 8:
      d.exec(left         ? map<shl_<uint64_t>, uint64_t, uint64_t, U>
             : arithmetic ? map<shr_<int64_t>, int64_t, int64_t, U>
                          : map<shr_<uint64_t>, uint64_t, uint64_t, U>,
             InstClass::logic);
      break;
    default:
      d.unsupported();
  }
  d.finish();
}

void three_words(Decode& d, Handler h) {
  d.type();
  d.expect_count(4);
  d.out(0, Type::b32);
  for (size_t i = 1; i < 4; ++i) d.in(i, Type::b32);
  d.exec(h, InstClass::logic);
  d.finish();
}

void decode_shf(Decode& d) {
  const bool left = d.pick({"l", "r"}) == "l";
  const bool clamp = d.pick({"clamp", "wrap"}) == "clamp";
  using U = uint32_t;
  three_words(d, left ? (clamp ? map<shf_l_clamp, U, U, U, U> : map<shf_l_wrap, U, U, U, U>)
                      : (clamp ? map<shf_r_clamp, U, U, U, U> : map<shf_r_wrap, U, U, U, U>));
}

void decode_prmt(Decode& d) {
  using U = uint32_t;
  const auto mode = d.pick({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  three_words(d, mode == "f4e"    ? map<prmt_mode<0>, U, U, U, U>
                 : mode == "b4e"  ? map<prmt_mode<1>, U, U, U, U>
                 : mode == "rc8"  ? map<prmt_mode<2>, U, U, U, U>
                 : mode == "ecl"  ? map<prmt_mode<3>, U, U, U, U>
                 : mode == "ecr"  ? map<prmt_mode<4>, U, U, U, U>
                 : mode == "rc16" ? map<prmt_mode<5>, U, U, U, U>
                                  : map<prmt_default, U, U, U, U>);
}

void decode_lop3(Decode& d) {
  if (!d.pick({"or", "and"}).empty()) d.unsupported("lop3 with a predicate result");
  if (d.type() != Type::b32) d.unsupported();
  d.expect_count(5);
  d.out(0, Type::b32);
  for (size_t i = 1; i < 4; ++i) d.in(i, Type::b32);
  d.inst.imm[0] = static_cast<uint32_t>(d.immediate(4));
  d.exec(exec_lop3, InstClass::logic);
  d.finish();
}

}  // namespace

void register_logic(OpcodeTable& t) {
  t["and"] = decode_and;
  t["or"] = decode_or;
  t["xor"] = decode_xor;
  t["not"] = decode_not;
  t["cnot"] = decode_cnot;
  t["shl"] = t["shr"] = decode_shift;
  t["shf"] = decode_shf;
  t["prmt"] = decode_prmt;
  t["lop3"] = decode_lop3;
}

}  // namespace ptxsim
