// Integer arithmetic.
#include "ops/integer.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "ops/lanes.h"
#include "ops/table.h"

namespace ptxsim {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
struct Widened;
template <>
struct Widened<int16_t> {
  using type = int32_t;
};
template <>
struct Widened<uint16_t> {
  using type = uint32_t;
};
template <>
struct Widened<int32_t> {
  using type = int64_t;
};
template <>
struct Widened<uint32_t> {
  using type = uint64_t;
};
template <>
struct Widened<int64_t> {
  using type = __int128;
};
template <>
struct Widened<uint64_t> {
  using type = unsigned __int128;
};
template <class T>
using Wide = typename Widened<T>::type;

// Arithmetic in the unsigned type (or wider), so that overflow wraps.
template <class T>
T add_(T a, T b) {
  return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
}
template <class T>
T sub_(T a, T b) {
  return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
}
template <class T>
T mul_lo(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
template <class T>
T mul_hi(T a, T b) {
  return static_cast<T>(Wide<T>(a) * Wide<T>(b) >> (8 * sizeof(T)));
}
template <class T>
Wide<T> mul_wide(T a, T b) {
  return static_cast<Wide<T>>(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b));
}
template <class T>
T mad_lo(T a, T b, T c) {
  return add_<T>(mul_lo(a, b), c);
}
template <class T>
T mad_hi(T a, T b, T c) {
  return add_<T>(mul_hi(a, b), c);
}
template <class T>
Wide<T> mad_wide(T a, T b, Wide<T> c) {
  return static_cast<Wide<T>>(static_cast<Unsigned<Wide<T>>>(mul_wide(a, b)) + static_cast<Unsigned<Wide<T>>>(c));
}
template <class T>
T sad_(T a, T b, T c) {
  return add_<T>(c, a < b ? sub_(b, a) : sub_(a, b));
}
template <class T>
T min_(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max_(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T abs_(T a) {
  return a < 0 ? sub_<T>(0, a) : a;
}
template <class T>
T neg_(T a) {
  return sub_<T>(0, a);
}

// Division by zero is unspecified in PTX; the hardware's routines return all
// ones, and so do we. INT_MIN / -1 wraps.
template <class T>
T div_(T a, T b) {
  if (b == 0) return static_cast<T>(~T{0});
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return neg_(a);
  return static_cast<T>(a / b);
}
template <class T>
T rem_(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}

int32_t saturate32(int64_t v) {
  return static_cast<int32_t>(
      std::clamp<int64_t>(v, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()));
}
int32_t add_sat(int32_t a, int32_t b) { return saturate32(int64_t{a} + b); }
int32_t sub_sat(int32_t a, int32_t b) { return saturate32(int64_t{a} - b); }
int32_t mad_hi_sat(int32_t a, int32_t b, int32_t c) { return saturate32(int64_t{mul_hi(a, b)} + c); }

template <class T>
uint32_t pairwise(uint32_t a, uint32_t b, T (*f)(T, T)) {
  const auto lo = static_cast<uint16_t>(f(static_cast<T>(a), static_cast<T>(b)));
  const auto hi = static_cast<uint16_t>(f(static_cast<T>(a >> 16), static_cast<T>(b >> 16)));
  return uint32_t{hi} << 16 | lo;
}
template <auto F, class T>
uint32_t both_halves(uint32_t a, uint32_t b) {
  return pairwise<T>(a, b, F);
}

uint32_t popc32(uint32_t a) { return static_cast<uint32_t>(__builtin_popcount(a)); }
uint32_t popc64(uint64_t a) { return static_cast<uint32_t>(__builtin_popcountll(a)); }
uint32_t clz32(uint32_t a) { return a ? static_cast<uint32_t>(__builtin_clz(a)) : 32; }
uint32_t clz64(uint64_t a) { return a ? static_cast<uint32_t>(__builtin_clzll(a)) : 64; }
uint32_t brev32(uint32_t a) {
  a = (a >> 1 & 0x55555555u) | (a & 0x55555555u) << 1;
  a = (a >> 2 & 0x33333333u) | (a & 0x33333333u) << 2;
  a = (a >> 4 & 0x0f0f0f0fu) | (a & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(a);
}
uint64_t brev64(uint64_t a) {
  return uint64_t{brev32(static_cast<uint32_t>(a))} << 32 | brev32(static_cast<uint32_t>(a >> 32));
}

/// Position of the leading bit that differs from the sign; ~0 if there is none.
template <class T, bool Shift>
uint32_t bfind_(T a) {
  Unsigned<T> u = static_cast<Unsigned<T>>(a);
  if (std::is_signed_v<T> && a < 0) u = static_cast<Unsigned<T>>(~u);
  if (u == 0) return ~0u;
  const uint32_t zeros = sizeof(T) == 8 ? clz64(u) : clz32(static_cast<uint32_t>(u));
  return Shift ? zeros : 8 * sizeof(T) - 1 - zeros;
}

template <class T>
T bfe_(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t top = 8 * sizeof(T) - 1;
  const uint32_t pos = position & 0xff, len = length & 0xff;
  const auto u = static_cast<Unsigned<T>>(a);
  bool sign = false;
  if (std::is_signed_v<T> && len) sign = u >> std::min(pos + len - 1, top) & 1;
  if (len == 0) return 0;
  Unsigned<T> field = pos > top ? 0 : u >> pos;
  // Bits of the field that lie beyond the top of a, or beyond len, take the sign.
  const uint32_t valid = pos > top ? 0 : std::min(len, top + 1 - pos);
  const Unsigned<T> mask = valid == 0 ? 0 : static_cast<Unsigned<T>>(~Unsigned<T>{0}) >> (top + 1 - valid);
  return static_cast<T>((field & mask) | (sign ? static_cast<Unsigned<T>>(~mask) : 0));
}

template <class T>
T bfi_(T a, T b, uint32_t position, uint32_t length) {
  constexpr uint32_t bits = 8 * sizeof(T);
  const uint32_t pos = position & 0xff, len = length & 0xff;
  if (len == 0 || pos >= bits) return b;
  const T ones = len >= bits ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << len) - 1);
  const T mask = ones << pos;
  return (b & ~mask) | (a << pos & mask);
}
template <class T>
void exec_bfi(Warp& w, const Inst& in) {
  const auto *a = w.src<T>(in.op[1]), *b = w.src<T>(in.op[2]);
  const auto *pos = w.src<uint32_t>(in.op[3]), *len = w.src<uint32_t>(in.op[4]);
  T r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l) r[l] = bfi_(a[l], b[l], pos[l], len[l]);
  blend(w.dst<T>(in.op[0]), r, w.exec);
}

uint32_t bmsk(uint32_t a, uint32_t b, bool clamp) {
  const uint32_t pos = clamp ? std::min(a, 32u) : a & 31, len = clamp ? std::min(b, 32u) : b & 31;
  const uint64_t ones = (1ull << len) - 1;
  return static_cast<uint32_t>(ones << pos);
}
uint32_t bmsk_clamp(uint32_t a, uint32_t b) { return bmsk(a, b, true); }
uint32_t bmsk_wrap(uint32_t a, uint32_t b) { return bmsk(a, b, false); }

template <class T, bool Clamp>
T szext_(T a, uint32_t b) {
  if (Clamp && b >= 32) return a;
  const uint32_t n = b & 31;
  if (n == 0) return 0;
  const uint32_t shift = 32 - n;
  return static_cast<T>(static_cast<T>(static_cast<uint32_t>(a) << shift) >> shift);
}

template <class A, class B>
uint32_t dp4a_(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i)
    c += static_cast<uint32_t>(int32_t{static_cast<A>(a >> 8 * i)} * int32_t{static_cast<B>(b >> 8 * i)});
  return c;
}
template <class A, class B, int Half>
uint32_t dp2a_(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 2; ++i)
    c +=
        static_cast<uint32_t>(int32_t{static_cast<A>(a >> 16 * i)} * int32_t{static_cast<B>(b >> (8 * i + 16 * Half))});
  return c;
}

uint32_t mul24(uint32_t a, uint32_t b) { return (a & 0xffffff) * (b & 0xffffff); }
int32_t mul24s(int32_t a, int32_t b) {
  const int32_t x = static_cast<int32_t>(static_cast<uint32_t>(a) << 8) >> 8,
                y = static_cast<int32_t>(static_cast<uint32_t>(b) << 8) >> 8;
  return static_cast<int32_t>(static_cast<uint32_t>(x) * static_cast<uint32_t>(y));
}

// ---- carries --------------------------------------------------------------------
// Operands: d, carry, then the sources. Kinds of the carry chain: in.imm[0] bit 0
// = reads the carry, bit 1 = writes it.
template <class T>
void exec_carry_add(Warp& w, const Inst& in) {
  const auto *a = w.src<T>(in.op[2]), *b = w.src<T>(in.op[3]);
  const uint32_t carry = (in.imm[0] & 1) ? w.predicate(in.op[1]) : 0;
  auto* d = w.dst<T>(in.op[0]);
  uint32_t out = 0;
  for_lanes(w.exec, [&](uint32_t l) {
    const auto sum = static_cast<unsigned __int128>(a[l]) + b[l] + (carry >> l & 1);
    out |= static_cast<uint32_t>(sum >> (8 * sizeof(T)) & 1) << l;
    d[l] = static_cast<T>(sum);
  });
  if (in.imm[0] & 2) w.set_predicate(in.op[1], out);
}
template <class T>
void exec_carry_sub(Warp& w, const Inst& in) {
  const auto *a = w.src<T>(in.op[2]), *b = w.src<T>(in.op[3]);
  const uint32_t borrow = (in.imm[0] & 1) ? w.predicate(in.op[1]) : 0;
  auto* d = w.dst<T>(in.op[0]);
  uint32_t out = 0;
  for_lanes(w.exec, [&](uint32_t l) {
    const auto difference = static_cast<unsigned __int128>(a[l]) - b[l] - (borrow >> l & 1);
    out |= static_cast<uint32_t>(difference >> (8 * sizeof(T)) & 1) << l;
    d[l] = static_cast<T>(difference);
  });
  if (in.imm[0] & 2) w.set_predicate(in.op[1], out);
}
/// in.variant: take the high half of the product.
template <class T>
void exec_carry_mad(Warp& w, const Inst& in) {
  const auto *a = w.src<T>(in.op[2]), *b = w.src<T>(in.op[3]), *c = w.src<T>(in.op[4]);
  const uint32_t carry = (in.imm[0] & 1) ? w.predicate(in.op[1]) : 0;
  auto* d = w.dst<T>(in.op[0]);
  uint32_t out = 0;
  for_lanes(w.exec, [&](uint32_t l) {
    const T product = in.variant ? mul_hi(a[l], b[l]) : mul_lo(a[l], b[l]);
    const auto sum = static_cast<unsigned __int128>(static_cast<Unsigned<T>>(product)) +
                     static_cast<Unsigned<T>>(c[l]) + (carry >> l & 1);
    out |= static_cast<uint32_t>(sum >> (8 * sizeof(T)) & 1) << l;
    d[l] = static_cast<T>(sum);
  });
  if (in.imm[0] & 2) w.set_predicate(in.op[1], out);
}

void carry_operands(Decode& d, Type t, size_t sources, bool reads, bool writes) {
  d.inst.imm[0] = uint32_t{reads} | uint32_t{writes} << 1;
  d.out(0, t);
  d.add(d.builder().carry());
  for (size_t i = 1; i <= sources; ++i) d.in(i, t);
}

// ---- decoding ---------------------------------------------------------------------

#define PTXSIM_BY_INT_TYPE(t, H)             \
  ((t) == Type::u16   ? Handler{H(uint16_t)} \
   : (t) == Type::s16 ? Handler{H(int16_t)}  \
   : (t) == Type::u32 ? Handler{H(uint32_t)} \
   : (t) == Type::s32 ? Handler{H(int32_t)}  \
   : (t) == Type::u64 ? Handler{H(uint64_t)} \
   : (t) == Type::s64 ? Handler{H(int64_t)}  \
                      : nullptr)

void sources(Decode& d, Type t, size_t n) {
  d.expect_count(n + 1);
  d.out(0, t);
  for (size_t i = 1; i <= n; ++i) d.in(i, t);
}

void done(Decode& d, Handler h) {
  d.exec(h, InstClass::int_);
  d.finish();
}

void decode_addc(Decode& d) {
  const bool cc = d.flag("cc");
  const Type t = d.type();
  d.expect_count(3);
  carry_operands(d, t, 2, true, cc);
  done(d, size_of(t) == 8 ? exec_carry_add<uint64_t> : exec_carry_add<uint32_t>);
}
void decode_subc(Decode& d) {
  const bool cc = d.flag("cc");
  const Type t = d.type();
  d.expect_count(3);
  carry_operands(d, t, 2, true, cc);
  done(d, size_of(t) == 8 ? exec_carry_sub<uint64_t> : exec_carry_sub<uint32_t>);
}

void mad_with_carry(Decode& d, bool reads, bool writes) {
  const auto half = d.pick({"lo", "hi"});
  if (half.empty()) d.unsupported();
  const Type t = d.type();
  d.expect_count(4);
  d.inst.variant = half == "hi";
  carry_operands(d, t, 3, reads, writes);
#define H(T) exec_carry_mad<T>
  done(d, PTXSIM_BY_INT_TYPE(t, H));
#undef H
}
void decode_madc(Decode& d) {
  const bool cc = d.flag("cc");
  mad_with_carry(d, true, cc);
}

void decode_sad(Decode& d) {
  const Type t = d.type();
  sources(d, t, 3);
#define H(T) map<sad_<T>, T, T, T, T>
  done(d, PTXSIM_BY_INT_TYPE(t, H));
#undef H
}
void decode_rem(Decode& d) {
  const Type t = d.type();
  sources(d, t, 2);
#define H(T) map<rem_<T>, T, T, T>
  done(d, PTXSIM_BY_INT_TYPE(t, H));
#undef H
}

void decode_count_bits(Decode& d) {
  const bool popc = d.base() == "popc";
  const Type t = d.type();
  d.expect_count(2);
  d.out(0, Type::b32);
  d.in(1, t);
  if (t == Type::b32)
    done(d, popc ? map<popc32, uint32_t, uint32_t> : map<clz32, uint32_t, uint32_t>);
  else if (t == Type::b64)
    done(d, popc ? map<popc64, uint32_t, uint64_t> : map<clz64, uint32_t, uint64_t>);
  else
    d.unsupported();
}

void decode_bfind(Decode& d) {
  const bool shift = d.flag("shiftamt");
  const Type t = d.type();
  d.expect_count(2);
  d.out(0, Type::b32);
  d.in(1, t);
  switch (t) {
    case Type::u32:
      done(d,
           shift ? map<bfind_<uint32_t, true>, uint32_t, uint32_t> : map<bfind_<uint32_t, false>, uint32_t, uint32_t>);
      break;
    case Type::s32:
      done(d, shift ? map<bfind_<int32_t, true>, uint32_t, int32_t> : map<bfind_<int32_t, false>, uint32_t, int32_t>);
      break;
    case Type::u64:
      done(d,
           shift ? map<bfind_<uint64_t, true>, uint32_t, uint64_t> : map<bfind_<uint64_t, false>, uint32_t, uint64_t>);
      break;
    case Type::s64:
      done(d, shift ? map<bfind_<int64_t, true>, uint32_t, int64_t> : map<bfind_<int64_t, false>, uint32_t, int64_t>);
      break;
    default:
      d.unsupported();
  }
}

void decode_brev(Decode& d) {
  const Type t = d.type();
  sources(d, t, 1);
  if (size_of(t) == 8)
    done(d, map<brev64, uint64_t, uint64_t>);
  else
    done(d, map<brev32, uint32_t, uint32_t>);
}

void decode_bfe(Decode& d) {
  const Type t = d.type();
  d.expect_count(4);
  d.out(0, t);
  d.in(1, t);
  d.in(2, Type::u32);
  d.in(3, Type::u32);
#define H(T) map<bfe_<T>, T, T, uint32_t, uint32_t>
  if (size_of(t) < 4) d.unsupported();
  done(d, PTXSIM_BY_INT_TYPE(t, H));
#undef H
}
void decode_bfi(Decode& d) {
  const Type t = d.type();
  d.expect_count(5);
  d.out(0, t);
  d.in(1, t);
  d.in(2, t);
  d.in(3, Type::u32);
  d.in(4, Type::u32);
  done(d, size_of(t) == 8 ? exec_bfi<uint64_t> : exec_bfi<uint32_t>);
}
void decode_bmsk(Decode& d) {
  const auto mode = d.pick({"clamp", "wrap"});
  sources(d, d.type(), 2);
  done(d,
       mode == "wrap" ? map<bmsk_wrap, uint32_t, uint32_t, uint32_t> : map<bmsk_clamp, uint32_t, uint32_t, uint32_t>);
}
void decode_szext(Decode& d) {
  const bool wrap = d.pick({"clamp", "wrap"}) == "wrap";
  const Type t = d.type();
  d.expect_count(3);
  d.out(0, t);
  d.in(1, t);
  d.in(2, Type::u32);
  if (t == Type::s32)
    done(d, wrap ? map<szext_<int32_t, false>, int32_t, int32_t, uint32_t>
                 : map<szext_<int32_t, true>, int32_t, int32_t, uint32_t>);
  else
    done(d, wrap ? map<szext_<uint32_t, false>, uint32_t, uint32_t, uint32_t>
                 : map<szext_<uint32_t, true>, uint32_t, uint32_t, uint32_t>);
}

void decode_dp4a(Decode& d) {
  const Type a = d.type(), b = d.type();
  sources(d, Type::b32, 3);
  const bool sa = a == Type::s32, sb = b == Type::s32;
  using U = uint32_t;
  done(d, sa ? (sb ? map<dp4a_<int8_t, int8_t>, U, U, U, U> : map<dp4a_<int8_t, uint8_t>, U, U, U, U>)
             : (sb ? map<dp4a_<uint8_t, int8_t>, U, U, U, U> : map<dp4a_<uint8_t, uint8_t>, U, U, U, U>));
}
void decode_dp2a(Decode& d) {
  const bool hi = d.pick({"lo", "hi"}) == "hi";
  const Type a = d.type(), b = d.type();
  sources(d, Type::b32, 3);
  using U = uint32_t;
  const bool sa = a == Type::s32, sb = b == Type::s32;
  if (sa && sb)
    done(d, hi ? map<dp2a_<int16_t, int8_t, 1>, U, U, U, U> : map<dp2a_<int16_t, int8_t, 0>, U, U, U, U>);
  else if (sa)
    done(d, hi ? map<dp2a_<int16_t, uint8_t, 1>, U, U, U, U> : map<dp2a_<int16_t, uint8_t, 0>, U, U, U, U>);
  else if (sb)
    done(d, hi ? map<dp2a_<uint16_t, int8_t, 1>, U, U, U, U> : map<dp2a_<uint16_t, int8_t, 0>, U, U, U, U>);
  else
    done(d, hi ? map<dp2a_<uint16_t, uint8_t, 1>, U, U, U, U> : map<dp2a_<uint16_t, uint8_t, 0>, U, U, U, U>);
}

void decode_mul24(Decode& d) {
  if (!d.flag("lo")) d.unsupported("only .lo");
  const Type t = d.type();
  sources(d, t, 2);
  done(d, t == Type::s32 ? map<mul24s, int32_t, int32_t, int32_t> : map<mul24, uint32_t, uint32_t, uint32_t>);
}

}  // namespace

namespace integer {

void add(Decode& d) {
  const bool sat = d.flag("sat"), cc = d.flag("cc");
  const Type t = d.type();
  if (cc) {
    d.expect_count(3);
    carry_operands(d, t, 2, false, true);
    return done(d, size_of(t) == 8 ? exec_carry_add<uint64_t> : exec_carry_add<uint32_t>);
  }
  sources(d, t, 2);
  if (t == Type::u16x2 || t == Type::s16x2)
    return done(d, map<both_halves<add_<uint16_t>, uint16_t>, uint32_t, uint32_t, uint32_t>);
  if (sat) {
    if (t != Type::s32) d.unsupported();
    return done(d, map<add_sat, int32_t, int32_t, int32_t>);
  }
#define H(T) map<add_<T>, T, T, T>
  done(d, PTXSIM_BY_INT_TYPE(t, H));
#undef H
}

void sub(Decode& d) {
  const bool sat = d.flag("sat"), cc = d.flag("cc");
  const Type t = d.type();
  if (cc) {
    d.expect_count(3);
    carry_operands(d, t, 2, false, true);
    return done(d, size_of(t) == 8 ? exec_carry_sub<uint64_t> : exec_carry_sub<uint32_t>);
  }
  sources(d, t, 2);
  if (sat) {
    if (t != Type::s32) d.unsupported();
    return done(d, map<sub_sat, int32_t, int32_t, int32_t>);
  }
#define H(T) map<sub_<T>, T, T, T>
  done(d, PTXSIM_BY_INT_TYPE(t, H));
#undef H
}

void mul(Decode& d) {
  const auto half = d.pick({"lo", "hi", "wide"});
  const Type t = d.type();
  d.expect_count(3);
  if (half == "wide") {
    const Type wide = t == Type::s16 ? Type::s32 : t == Type::u16 ? Type::u32 : t == Type::s32 ? Type::s64 : Type::u64;
    d.out(0, wide);
    d.in(1, t);
    d.in(2, t);
    switch (t) {
      case Type::u16:
        return done(d, map<mul_wide<uint16_t>, uint32_t, uint16_t, uint16_t>);
      case Type::s16:
        return done(d, map<mul_wide<int16_t>, int32_t, int16_t, int16_t>);
      case Type::u32:
        return done(d, map<mul_wide<uint32_t>, uint64_t, uint32_t, uint32_t>);
      case Type::s32:
        return done(d, map<mul_wide<int32_t>, int64_t, int32_t, int32_t>);
      default:
        d.unsupported();
    }
  }
  sources(d, t, 2);
#define LO(T) map<mul_lo<T>, T, T, T>
#define HI(T) map<mul_hi<T>, T, T, T>
  if (half.empty()) d.unsupported("integer mul without .lo, .hi or .wide");
  done(d, half == "hi" ? PTXSIM_BY_INT_TYPE(t, HI) : PTXSIM_BY_INT_TYPE(t, LO));
#undef LO
#undef HI
}

void mad(Decode& d) {
  const bool sat = d.flag("sat");
  if (d.flag("cc")) return mad_with_carry(d, false, true);
  const auto half = d.pick({"lo", "hi", "wide"});
  const Type t = d.type();
  d.expect_count(4);
  if (half == "wide") {
    const Type wide = t == Type::s16 ? Type::s32 : t == Type::u16 ? Type::u32 : t == Type::s32 ? Type::s64 : Type::u64;
    d.out(0, wide);
    d.in(1, t);
    d.in(2, t);
    d.in(3, wide);
    switch (t) {
      case Type::u16:
        return done(d, map<mad_wide<uint16_t>, uint32_t, uint16_t, uint16_t, uint32_t>);
      case Type::s16:
        return done(d, map<mad_wide<int16_t>, int32_t, int16_t, int16_t, int32_t>);
      case Type::u32:
        return done(d, map<mad_wide<uint32_t>, uint64_t, uint32_t, uint32_t, uint64_t>);
      case Type::s32:
        return done(d, map<mad_wide<int32_t>, int64_t, int32_t, int32_t, int64_t>);
      default:
        d.unsupported();
    }
  }
  sources(d, t, 3);
  if (sat) {
    if (t != Type::s32 || half != "hi") d.unsupported();
    return done(d, map<mad_hi_sat, int32_t, int32_t, int32_t, int32_t>);
  }
#define LO(T) map<mad_lo<T>, T, T, T, T>
#define HI(T) map<mad_hi<T>, T, T, T, T>
  if (half.empty()) d.unsupported("integer mad without .lo, .hi or .wide");
  done(d, half == "hi" ? PTXSIM_BY_INT_TYPE(t, HI) : PTXSIM_BY_INT_TYPE(t, LO));
#undef LO
#undef HI
}

void div(Decode& d) {
  const Type t = d.type();
  sources(d, t, 2);
#define H(T) map<div_<T>, T, T, T>
  done(d, PTXSIM_BY_INT_TYPE(t, H));
#undef H
}

void min(Decode& d) {
  const bool relu = d.flag("relu");
  const Type t = d.type();
  if (relu) d.unsupported("integer min.relu");
  sources(d, t, 2);
  if (t == Type::u16x2) return done(d, map<both_halves<min_<uint16_t>, uint16_t>, uint32_t, uint32_t, uint32_t>);
  if (t == Type::s16x2) return done(d, map<both_halves<min_<int16_t>, int16_t>, uint32_t, uint32_t, uint32_t>);
#define H(T) map<min_<T>, T, T, T>
  done(d, PTXSIM_BY_INT_TYPE(t, H));
#undef H
}

void max(Decode& d) {
  const bool relu = d.flag("relu");
  const Type t = d.type();
  if (relu) d.unsupported("integer max.relu");
  sources(d, t, 2);
  if (t == Type::u16x2) return done(d, map<both_halves<max_<uint16_t>, uint16_t>, uint32_t, uint32_t, uint32_t>);
  if (t == Type::s16x2) return done(d, map<both_halves<max_<int16_t>, int16_t>, uint32_t, uint32_t, uint32_t>);
#define H(T) map<max_<T>, T, T, T>
  done(d, PTXSIM_BY_INT_TYPE(t, H));
#undef H
}

void abs(Decode& d) {
  const Type t = d.type();
  sources(d, t, 1);
  switch (t) {
    case Type::s16:
      return done(d, map<abs_<int16_t>, int16_t, int16_t>);
    case Type::s32:
      return done(d, map<abs_<int32_t>, int32_t, int32_t>);
    case Type::s64:
      return done(d, map<abs_<int64_t>, int64_t, int64_t>);
    default:
      d.unsupported();
  }
}

void neg(Decode& d) {
  const Type t = d.type();
  sources(d, t, 1);
  switch (t) {
    case Type::s16:
      return done(d, map<neg_<int16_t>, int16_t, int16_t>);
    case Type::s32:
      return done(d, map<neg_<int32_t>, int32_t, int32_t>);
    case Type::s64:
      return done(d, map<neg_<int64_t>, int64_t, int64_t>);
    default:
      d.unsupported();
  }
}

}  // namespace integer

void register_integer(OpcodeTable& t) {
  t["addc"] = decode_addc;
  t["subc"] = decode_subc;
  t["madc"] = decode_madc;
  t["sad"] = decode_sad;
  t["rem"] = decode_rem;
  t["popc"] = t["clz"] = decode_count_bits;
  t["bfind"] = decode_bfind;
  t["brev"] = decode_brev;
  t["bfe"] = decode_bfe;
  t["bfi"] = decode_bfi;
  t["bmsk"] = decode_bmsk;
  t["szext"] = decode_szext;
  t["dp4a"] = decode_dp4a;
  t["dp2a"] = decode_dp2a;
  t["mul24"] = decode_mul24;
}

}  // namespace ptxsim
