// Floating-point min, max, abs, neg, copysign, testp.
#include "ops/float_lanes.h"
#include "ops/integer.h"
#include "ops/table.h"

namespace ptxsim {
namespace {

enum Flag : uint8_t { kMax = 1, kNan = 2, kXorsign = 4, kFtz = 8 };

template <class T>
T select(T a, T b, uint8_t flags) {
  if (flags & kFtz) a = flush(a), b = flush(b);
  const bool negative = std::signbit(a) != std::signbit(b);
  if (flags & kXorsign) a = std::fabs(a), b = std::fabs(b);
  if ((flags & kNan) && (a != a || b != b)) return canonical(std::numeric_limits<T>::quiet_NaN());
  T r = flags & kMax ? max_number(a, b) : min_number(a, b);
  if ((flags & kXorsign) && r == r) r = negative ? -r : r;
  return r;
}

template <class H>
H select_small(H a, H b, uint8_t flags) {
  if (flags & kFtz) a = flush(a), b = flush(b);
  return from_float(select(to_float(a), to_float(b), flags & ~kFtz), H{});
}
half select(half a, half b, uint8_t flags) { return select_small(a, b, flags); }
bfloat select(bfloat a, bfloat b, uint8_t flags) { return select_small(a, b, flags); }
template <class P>
P select_packed(P a, P b, uint8_t flags) {
  return pack<P>(select(low(a), low(b), flags), select(high(a), high(b), flags));
}
half2 select(half2 a, half2 b, uint8_t flags) { return select_packed(a, b, flags); }
bfloat2 select(bfloat2 a, bfloat2 b, uint8_t flags) { return select_packed(a, b, flags); }

/// Two or three inputs.
template <class T>
void exec_select(Warp& w, const Inst& in) {
  const T *a = w.src<T>(in.op[1]), *b = w.src<T>(in.op[2]);
  T r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l) r[l] = select(a[l], b[l], in.variant);
  if (in.n_op > 3) {
    const T* c = w.src<T>(in.op[3]);
    for (uint32_t l = 0; l < kWarpSize; ++l) r[l] = select(r[l], c[l], in.variant);
  }
  blend(w.dst<T>(in.op[0]), r, w.exec);
}

bool integer_form(Decode& d) {
  for (std::string_view m : d.modifiers())
    if (const auto t = parse_type(m)) return is_int(*t) || *t == Type::u16x2 || *t == Type::s16x2;
  d.unsupported("no operand type");
}

void decode_minmax(Decode& d) {
  const bool is_max = d.base() == "max";
  if (integer_form(d)) return is_max ? integer::max(d) : integer::min(d);
  const bool ftz = d.flag("ftz"), nan = d.flag("NaN"), xorsign = d.flag("xorsign");
  if (xorsign && !d.flag("abs")) d.unsupported();
  const Type t = d.type();
  if (d.count() != 3 && d.count() != 4) d.unsupported();
  d.out(0, t);
  for (size_t i = 1; i < d.count(); ++i) d.in(i, t);
  d.inst.variant =
      static_cast<uint8_t>((is_max ? kMax : 0) | (nan ? kNan : 0) | (xorsign ? kXorsign : 0) | (ftz ? kFtz : 0));
  switch (t) {
    case Type::f32:
      d.exec(exec_select<float>, InstClass::fp32);
      break;
    case Type::f64:
      d.exec(exec_select<double>, InstClass::fp64);
      break;
    case Type::f16:
      d.exec(exec_select<half>, InstClass::fp16);
      break;
    case Type::bf16:
      d.exec(exec_select<bfloat>, InstClass::fp16);
      break;
    case Type::f16x2:
      d.exec(exec_select<half2>, InstClass::fp16);
      break;
    case Type::bf16x2:
      d.exec(exec_select<bfloat2>, InstClass::fp16);
      break;
    default:
      d.unsupported();
  }
  d.finish();
}

// abs and neg touch the sign bit only, so they work on the bits.
template <class T, T Keep, T Flip>
T sign_op(T a) {
  return (a & Keep) ^ Flip;
}
float neg_ftz(float a) { return flush(-a); }
float abs_ftz(float a) { return flush(std::fabs(a)); }

void decode_sign(Decode& d) {
  const bool is_abs = d.base() == "abs";
  if (integer_form(d)) return is_abs ? integer::abs(d) : integer::neg(d);
  const bool ftz = d.flag("ftz");
  const Type t = d.type();
  d.expect_count(2);
  d.out(0, t);
  d.in(1, t);
  using U16 = uint16_t;
  using U32 = uint32_t;
  using U64 = uint64_t;
  switch (t) {
    case Type::f32:
      if (ftz)
        d.exec(is_abs ? map<abs_ftz, float, float> : map<neg_ftz, float, float>, InstClass::fp32);
      else
        d.exec(is_abs ? map<sign_op<U32, 0x7fffffff, 0>, U32, U32> : map<sign_op<U32, ~0u, 0x80000000>, U32, U32>,
               InstClass::fp32);
      break;
    case Type::f64:
      d.exec(is_abs ? map<sign_op<U64, 0x7fffffffffffffff, 0>, U64, U64>
                    : map<sign_op<U64, ~0ull, 0x8000000000000000>, U64, U64>,
             InstClass::fp64);
      break;
    case Type::f16:
    case Type::bf16:
      if (ftz) d.unsupported("ftz");
      d.exec(is_abs ? map<sign_op<U16, 0x7fff, 0>, U16, U16> : map<sign_op<U16, 0xffff, 0x8000>, U16, U16>,
             InstClass::fp16);
      break;
    case Type::f16x2:
    case Type::bf16x2:
      if (ftz) d.unsupported("ftz");
      d.exec(is_abs ? map<sign_op<U32, 0x7fff7fff, 0>, U32, U32> : map<sign_op<U32, ~0u, 0x80008000>, U32, U32>,
             InstClass::fp16);
      break;
    default:
      d.unsupported();
  }
  d.finish();
}

/// copysign d, a, b: the sign of a with the magnitude of b.
float copysign32(float a, float b) { return std::copysign(b, a); }
double copysign64(double a, double b) { return std::copysign(b, a); }
void decode_copysign(Decode& d) {
  const Type t = d.type();
  d.expect_count(3);
  d.out(0, t);
  d.in(1, t);
  d.in(2, t);
  d.exec(t == Type::f64 ? map<copysign64, double, double, double> : map<copysign32, float, float, float>,
         InstClass::fp32);
  d.finish();
}

enum class Test : uint8_t { finite, infinite, number, notanumber, normal, subnormal };
template <class T>
void exec_testp(Warp& w, const Inst& in) {
  const T* a = w.src<T>(in.op[1]);
  uint32_t r = 0;
  for_lanes(w.exec, [&](uint32_t l) {
    bool v = false;
    switch (static_cast<Test>(in.variant)) {
      case Test::finite:
        v = std::isfinite(a[l]);
        break;
      case Test::infinite:
        v = std::isinf(a[l]);
        break;
      case Test::number:
        v = a[l] == a[l];
        break;
      case Test::notanumber:
        v = a[l] != a[l];
        break;
      case Test::normal:
        v = std::isnormal(a[l]);
        break;
      case Test::subnormal:
        v = std::fpclassify(a[l]) == FP_SUBNORMAL;
        break;
    }
    r |= uint32_t{v} << l;
  });
  w.set_predicate(in.op[0], r);
}
void decode_testp(Decode& d) {
  constexpr std::string_view kNames[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  const std::string_view test = d.next();
  for (uint8_t i = 0; i < 6; ++i)
    if (kNames[i] == test) {
      d.inst.variant = i;
      const Type t = d.type();
      d.predicate(0);
      d.in(1, t);
      d.exec(t == Type::f64 ? exec_testp<double> : exec_testp<float>, InstClass::predicate);
      return d.finish();
    }
  d.unsupported();
}

}  // namespace

void register_minmax(OpcodeTable& t) {
  t["min"] = t["max"] = decode_minmax;
  t["abs"] = t["neg"] = decode_sign;
  t["copysign"] = decode_copysign;
  t["testp"] = decode_testp;
}

}  // namespace ptxsim
