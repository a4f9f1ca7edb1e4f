// cvt: a conversion reads its source into a wide type, transforms it, and
// writes it in the destination format. Registers may be wider than the types.
#include <algorithm>
#include <type_traits>

#include "ops/float_lanes.h"
#include "ops/table.h"

namespace ptxsim {
namespace {

enum class Integral : uint8_t { no, yes };

/// Details of a conversion that do not fit in Inst: packed into imm.
struct Spec {
  Type to, from;
  Round round;
  bool to_integral, ftz, sat, satfinite, relu;

  void store(Inst& in) const {
    in.imm[0] = static_cast<uint32_t>(to) | static_cast<uint32_t>(from) << 8 | static_cast<uint32_t>(round) << 16;
    in.imm[1] = uint32_t{to_integral} | uint32_t{ftz} << 1 | uint32_t{sat} << 2 | uint32_t{satfinite} << 3 |
                uint32_t{relu} << 4;
  }
  static Spec load(const Inst& in) {
    const uint32_t a = in.imm[0], b = in.imm[1];
    return {static_cast<Type>(a & 0xff),
            static_cast<Type>(a >> 8 & 0xff),
            static_cast<Round>(a >> 16),
            (b & 1) != 0,
            (b & 2) != 0,
            (b & 4) != 0,
            (b & 8) != 0,
            (b & 16) != 0};
  }
};

// ---- reading and writing registers wider than the type -------------------------
template <class R, class S>
void widen(const R* p, int64_t* v) {
  for (uint32_t l = 0; l < kWarpSize; ++l) v[l] = static_cast<int64_t>(static_cast<S>(p[l]));
}
template <class S>
void load_as(const Warp& w, const Operand& o, int64_t* v) {
  switch (o.bytes) {
    case 1:
      return widen<uint8_t, S>(w.src<uint8_t>(o), v);
    case 2:
      return widen<uint16_t, S>(w.src<uint16_t>(o), v);
    case 4:
      return widen<uint32_t, S>(w.src<uint32_t>(o), v);
    default:
      return widen<uint64_t, S>(w.src<uint64_t>(o), v);
  }
}
void load_integer(const Warp& w, const Operand& o, Type t, int64_t* v) {
  switch (t) {
    case Type::u8:
      return load_as<uint8_t>(w, o, v);
    case Type::s8:
      return load_as<int8_t>(w, o, v);
    case Type::u16:
      return load_as<uint16_t>(w, o, v);
    case Type::s16:
      return load_as<int16_t>(w, o, v);
    case Type::u32:
      return load_as<uint32_t>(w, o, v);
    case Type::s32:
      return load_as<int32_t>(w, o, v);
    default:
      return load_as<int64_t>(w, o, v);  // u64 keeps its bits
  }
}
template <class R>
void store_as(Warp& w, const Operand& o, const int64_t* v) {
  R r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l) r[l] = static_cast<R>(v[l]);
  blend(w.dst<R>(o), r, w.exec);
}
/// v holds the value already extended from its type.
void store_bits(Warp& w, const Operand& o, const int64_t* v) {
  switch (o.bytes) {
    case 2:
      return store_as<uint16_t>(w, o, v);
    case 4:
      return store_as<uint32_t>(w, o, v);
    default:
      return store_as<uint64_t>(w, o, v);
  }
}

double load_real(const Warp& w, const Operand& o, Type t, uint32_t l) {
  uint64_t bits = o.bytes == 2 ? w.src<uint16_t>(o)[l] : o.bytes == 4 ? w.src<uint32_t>(o)[l] : w.src<uint64_t>(o)[l];
  switch (t) {
    case Type::f16:
      return to_float(half{static_cast<uint16_t>(bits)});
    case Type::bf16:
      return to_float(bfloat{static_cast<uint16_t>(bits)});
    case Type::f32:
      return std::bit_cast<float>(static_cast<uint32_t>(bits));
    default:
      return std::bit_cast<double>(bits);
  }
}

/// Bits of x in the real format `t`.
uint64_t real_bits(double x, const Spec& s) {
  if (s.sat) x = x != x ? 0 : std::clamp(x, 0.0, 1.0);
  if (s.relu && !(x != x) && x <= 0) x = 0;
  switch (s.to) {
    case Type::f16:
      return s.round == Round::rn && !s.satfinite ? to_half(to_odd(x)).bits : encode(x, kF16, s.round, s.satfinite);
    case Type::bf16:
      return s.round == Round::rn && !s.satfinite ? to_bfloat(to_odd(x)).bits : encode(x, kBf16, s.round, s.satfinite);
    case Type::tf32:
      return uint64_t{encode(x, kTf32, s.round, s.satfinite)} << 13 | (x != x ? 0x1fff : 0);
    case Type::f32: {
      float f = round_to_float(x, s.round);
      if (s.ftz) f = flush(f);
      return std::bit_cast<uint32_t>(canonical(f));
    }
    default:
      return std::bit_cast<uint64_t>(x);
  }
}

// ---- int -> int ------------------------------------------------------------------
int64_t saturate_to(int64_t v, bool from_u64, Type to) {
  auto clamp = [&](int64_t lo, int64_t hi) { return from_u64 && v < 0 ? hi : std::clamp(v, lo, hi); };
  switch (to) {
    case Type::u8:
      return clamp(0, 0xff);
    case Type::s8:
      return clamp(-128, 127);
    case Type::u16:
      return clamp(0, 0xffff);
    case Type::s16:
      return clamp(-32768, 32767);
    case Type::u32:
      return clamp(0, 0xffffffff);
    case Type::s32:
      return clamp(std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max());
    case Type::s64:
      return from_u64 && v < 0 ? std::numeric_limits<int64_t>::max() : v;
    default:
      return from_u64 ? v : std::max<int64_t>(v, 0);
  }
}
int64_t extend(int64_t v, Type t) {
  switch (t) {
    case Type::u8:
      return static_cast<uint8_t>(v);
    case Type::s8:
      return static_cast<int8_t>(v);
    case Type::u16:
      return static_cast<uint16_t>(v);
    case Type::s16:
      return static_cast<int16_t>(v);
    case Type::u32:
      return static_cast<uint32_t>(v);
    case Type::s32:
      return static_cast<int32_t>(v);
    default:
      return v;
  }
}
void exec_int_to_int(Warp& w, const Inst& in) {
  const Spec s = Spec::load(in);
  int64_t v[kWarpSize];
  load_integer(w, in.op[1], s.from, v);
  if (s.sat)
    for (int64_t& x : v) x = saturate_to(x, s.from == Type::u64, s.to);
  if (size_of(s.to) < in.op[0].bytes)  // otherwise the store truncates
    for (int64_t& x : v) x = extend(x, s.to);
  store_bits(w, in.op[0], v);
}

// ---- int -> float ----------------------------------------------------------------
void exec_int_to_float(Warp& w, const Inst& in) {
  const Spec s = Spec::load(in);
  int64_t v[kWarpSize], r[kWarpSize] = {};
  load_integer(w, in.op[1], s.from, v);
  for_lanes(w.exec, [&](uint32_t l) {
    // A 64-bit integer need not be exact in double: keep the sticky bit.
    const long double exact =
        s.from == Type::u64 ? static_cast<long double>(static_cast<uint64_t>(v[l])) : static_cast<long double>(v[l]);
    double x = static_cast<double>(exact);
    if (static_cast<long double>(x) != exact) {
      if (s.to == Type::f64) {
        if (s.round != Round::rn) {
          const double next = std::nextafter(x, static_cast<long double>(x) < exact ? INFINITY : -INFINITY);
          const double lo = std::min(x, next), hi = std::max(x, next);
          x = s.round == Round::rm ? lo : s.round == Round::rp ? hi : (exact > 0 ? lo : hi);
        }
      } else {
        uint64_t bits = std::bit_cast<uint64_t>(x);
        if ((static_cast<long double>(x) > exact) == (x > 0)) --bits;
        x = std::bit_cast<double>(bits | 1);
      }
    }
    r[l] = static_cast<int64_t>(real_bits(x, s));
  });
  store_bits(w, in.op[0], r);
}

// ---- float -> int ----------------------------------------------------------------
int64_t to_integer(double x, const Spec& s) {
  const unsigned bits = 8 * size_of(s.to);
  if (x != x) {  // the hardware's value for NaN: 0, or only the top bit set
    if (s.from != Type::f64 && bits != 64) return 0;
    return extend(static_cast<int64_t>(1ull << (bits - 1)), s.to);
  }
  x = round_to_integral(x, s.round);
  if (is_signed_int(s.to)) {
    const double limit = std::ldexp(1.0, static_cast<int>(bits) - 1);
    if (x >= limit) return bits == 64 ? std::numeric_limits<int64_t>::max() : static_cast<int64_t>(limit) - 1;
    if (x < -limit) return bits == 64 ? std::numeric_limits<int64_t>::min() : -static_cast<int64_t>(limit);
    return static_cast<int64_t>(x);
  }
  const double limit = std::ldexp(1.0, static_cast<int>(bits));
  if (x < 0) return 0;
  if (x >= limit) return bits == 64 ? -1 : static_cast<int64_t>(limit) - 1;
  return static_cast<int64_t>(static_cast<uint64_t>(x));
}
void exec_float_to_int(Warp& w, const Inst& in) {
  const Spec s = Spec::load(in);
  int64_t r[kWarpSize] = {};
  for_lanes(w.exec, [&](uint32_t l) {
    double x = load_real(w, in.op[1], s.from, l);
    if (s.ftz) x = flush(static_cast<float>(x));
    r[l] = to_integer(x, s);
  });
  store_bits(w, in.op[0], r);
}

// ---- float -> float --------------------------------------------------------------
void exec_float_to_float(Warp& w, const Inst& in) {
  const Spec s = Spec::load(in);
  int64_t r[kWarpSize] = {};
  for_lanes(w.exec, [&](uint32_t l) {
    double x = load_real(w, in.op[1], s.from, l);
    if (s.ftz && s.from == Type::f32) x = flush(static_cast<float>(x));
    Spec exact = s;
    if (s.to_integral) {
      x = std::copysign(round_to_integral(x, s.round), x);
      exact.round = Round::rn;
    }
    r[l] = static_cast<int64_t>(real_bits(x, exact));
  });
  store_bits(w, in.op[0], r);
}

// The common exact or nearest conversions, vectorised by the compiler.
float half_to_float(half h) { return canonical(to_float(h)); }
float bfloat_to_float(bfloat h) { return canonical(to_float(h)); }
half float_to_half(float x) { return to_half(x); }
bfloat float_to_bfloat(float x) { return to_bfloat(x); }
uint64_t zext32(uint32_t x) { return x; }
int64_t sext32(int32_t x) { return x; }
uint32_t trunc64(uint64_t x) { return static_cast<uint32_t>(x); }
float from_s32(int32_t x) { return static_cast<float>(x); }

Handler fast_path(const Spec& s, const Operand& d, const Operand& a) {
  if (s.ftz || s.sat || s.relu || s.satfinite || s.to_integral) return nullptr;
  if (d.bytes != size_of(s.to) || a.bytes != size_of(s.from) || s.round != Round::rn) return nullptr;
  if (s.to == Type::f32 && s.from == Type::f16) return map<half_to_float, float, half>;
  if (s.to == Type::f32 && s.from == Type::bf16) return map<bfloat_to_float, float, bfloat>;
  if (s.to == Type::f16 && s.from == Type::f32) return map<float_to_half, half, float>;
  if (s.to == Type::bf16 && s.from == Type::f32) return map<float_to_bfloat, bfloat, float>;
  if (s.to == Type::f32 && s.from == Type::s32) return map<from_s32, float, int32_t>;
  if (size_of(s.to) == 8 && is_int(s.to)) {
    if (s.from == Type::u32) return map<zext32, uint64_t, uint32_t>;
    if (s.from == Type::s32) return map<sext32, int64_t, int32_t>;
  }
  if (size_of(s.to) == 4 && is_int(s.to) && is_int(s.from) && size_of(s.from) == 8)
    return map<trunc64, uint32_t, uint64_t>;
  return nullptr;
}

// ---- packed ------------------------------------------------------------------------
uint32_t small_bits(double x, Type element, const Spec& s) {
  if (s.relu && !(x != x) && x <= 0) x = 0;
  switch (element) {
    case Type::f16:
      return encode(x, kF16, s.round, s.satfinite);
    case Type::bf16:
      return encode(x, kBf16, s.round, s.satfinite);
    case Type::e4m3:
      return encode(x, kE4m3, s.round, true);
    default:
      return encode(x, kE5m2, s.round, true);
  }
}
/// Two f32 -> packed pair; the first source is the upper element.
void exec_pack_f32(Warp& w, const Inst& in) {
  const Spec s = Spec::load(in);
  const float *hi = w.src<float>(in.op[1]), *lo = w.src<float>(in.op[2]);
  int64_t r[kWarpSize] = {};
  const bool plain = s.round == Round::rn && !s.satfinite && !s.relu;
  for_lanes(w.exec, [&](uint32_t l) {
    if (s.to == Type::f16x2 && plain)
      r[l] = uint32_t{to_half(hi[l]).bits} << 16 | to_half(lo[l]).bits;
    else if (s.to == Type::bf16x2 && plain)
      r[l] = uint32_t{to_bfloat(hi[l]).bits} << 16 | to_bfloat(lo[l]).bits;
    else if (s.to == Type::f16x2)
      r[l] = small_bits(hi[l], Type::f16, s) << 16 | small_bits(lo[l], Type::f16, s);
    else if (s.to == Type::bf16x2)
      r[l] = small_bits(hi[l], Type::bf16, s) << 16 | small_bits(lo[l], Type::bf16, s);
    else if (s.to == Type::e4m3x2)
      r[l] = small_bits(hi[l], Type::e4m3, s) << 8 | small_bits(lo[l], Type::e4m3, s);
    else
      r[l] = small_bits(hi[l], Type::e5m2, s) << 8 | small_bits(lo[l], Type::e5m2, s);
  });
  store_bits(w, in.op[0], r);
}
void exec_f16x2_to_fp8x2(Warp& w, const Inst& in) {
  const Spec s = Spec::load(in);
  const half2* a = w.src<half2>(in.op[1]);
  const Type e = s.to == Type::e4m3x2 ? Type::e4m3 : Type::e5m2;
  int64_t r[kWarpSize] = {};
  for_lanes(w.exec, [&](uint32_t l) {
    r[l] = small_bits(to_float(high(a[l])), e, s) << 8 | small_bits(to_float(low(a[l])), e, s);
  });
  store_bits(w, in.op[0], r);
}
void exec_fp8x2_to_f16x2(Warp& w, const Inst& in) {
  const Spec s = Spec::load(in);
  const uint16_t* a = w.src<uint16_t>(in.op[1]);
  const Format& f = s.from == Type::e4m3x2 ? kE4m3 : kE5m2;
  int64_t r[kWarpSize] = {};
  for_lanes(w.exec, [&](uint32_t l) {
    Spec plain = s;
    plain.satfinite = false;
    r[l] =
        small_bits(decode(a[l] >> 8, f), Type::f16, plain) << 16 | small_bits(decode(a[l] & 0xff, f), Type::f16, plain);
  });
  store_bits(w, in.op[0], r);
}

/// cvt.pack.sat.T.s32{.b32} d, a, b {, c}
void exec_cvt_pack(Warp& w, const Inst& in) {
  const Spec s = Spec::load(in);
  const auto *a = w.src<int32_t>(in.op[1]), *b = w.src<int32_t>(in.op[2]);
  const auto* c = in.n_op > 3 ? w.src<uint32_t>(in.op[3]) : nullptr;
  auto* d = w.dst<uint32_t>(in.op[0]);
  const unsigned bits = 8 * size_of(s.to);
  const uint32_t mask = (1u << bits) - 1;
  for_lanes(w.exec, [&](uint32_t l) {
    const auto hi = static_cast<uint32_t>(saturate_to(a[l], false, s.to)) & mask;
    const auto lo = static_cast<uint32_t>(saturate_to(b[l], false, s.to)) & mask;
    d[l] = (c ? c[l] << (2 * bits) : 0) | hi << bits | lo;
  });
}

void decode_cvt(Decode& d) {
  Spec s{};
  if (d.flag("pack")) {
    d.flag("sat");
    s.to = d.type(), s.from = d.type();
    if (s.from != Type::s32) d.unsupported();
    d.out(0, Type::b32);
    d.in(1, Type::s32);
    d.in(2, Type::s32);
    if (d.has_type()) {
      d.type();
      d.in(3, Type::b32);
    }
    s.store(d.inst);
    d.exec(exec_cvt_pack, InstClass::conversion);
    return d.finish();
  }
  s.ftz = d.flag("ftz"), s.sat = d.flag("sat"), s.satfinite = d.flag("satfinite"), s.relu = d.flag("relu");
  const auto integral = d.pick({"rni", "rzi", "rmi", "rpi"});
  const auto rounding = d.pick({"rna", "rn", "rz", "rm", "rp"});
  s.to_integral = !integral.empty();
  const std::string_view r = s.to_integral ? integral.substr(0, 2) : rounding;
  s.round = r == "rz" ? Round::rz : r == "rm" ? Round::rm : r == "rp" ? Round::rp : r == "rna" ? Round::rna : Round::rn;
  s.to = d.type(), s.from = d.type();
  auto done = [&](Handler h) {
    s.store(d.inst);
    d.exec(h, InstClass::conversion);
    d.finish();
  };
  const bool packs_fp8 = s.to == Type::e4m3x2 || s.to == Type::e5m2x2;
  if (packs_fp8 || s.to == Type::f16x2 || s.to == Type::bf16x2) {
    d.add(d.any_result(d.arg(0), size_of(s.to)));
    if (s.from == Type::f32) {
      d.expect_count(3);
      d.in(1, Type::f32);
      d.in(2, Type::f32);
      return done(exec_pack_f32);
    }
    d.expect_count(2);
    if (packs_fp8 && s.from == Type::f16x2) {
      d.in(1, Type::f16x2);
      return done(exec_f16x2_to_fp8x2);
    }
    if (s.to == Type::f16x2 && (s.from == Type::e4m3x2 || s.from == Type::e5m2x2)) {
      d.in(1, Type::b16);
      return done(exec_fp8x2_to_f16x2);
    }
    d.unsupported();
  }
  d.expect_count(2);
  const bool to_real = is_float(s.to), from_real = is_float(s.from);
  if (!(to_real || is_int(s.to)) || !(from_real || is_int(s.from))) d.unsupported();
  const Operand out = d.any_result(d.arg(0), size_of(s.to)), a = d.any_source(d.arg(1), s.from);
  d.add(out);
  d.add(a);
  if (const Handler fast = fast_path(s, out, a)) return done(fast);
  if (!from_real && !to_real) return done(exec_int_to_int);
  if (!from_real) return done(exec_int_to_float);
  if (!to_real) {
    if (!s.to_integral) d.unsupported("float to integer without a rounding modifier");
    return done(exec_float_to_int);
  }
  done(exec_float_to_float);
}

}  // namespace

void register_convert(OpcodeTable& t) { t["cvt"] = decode_cvt; }

}  // namespace ptxsim
