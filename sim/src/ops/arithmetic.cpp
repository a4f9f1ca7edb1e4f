// Floating-point add, sub, mul, fma, div, sqrt; opcodes shared with integers.
#include <cfenv>

#include "ops/float_lanes.h"
#include "ops/integer.h"
#include "ops/table.h"

namespace ptxsim {
namespace {

enum class Op : uint8_t { add, sub, mul, fma, div, rcp, sqrt };
constexpr int arity(Op op) { return op == Op::fma ? 3 : (op == Op::rcp || op == Op::sqrt) ? 1 : 2; }

template <class T, Op O>
T compute(T a, T b, T c) {
  switch (O) {
    case Op::add:
      return a + b;
    case Op::sub:
      return a - b;
    case Op::mul:
      return a * b;
    case Op::fma:
      return std::fma(a, b, c);
    case Op::div:
      return a / b;
    case Op::rcp:
      return T{1} / a;
    case Op::sqrt:
      return std::sqrt(a);
  }
}

// ---- f32 and f64, round to nearest ---------------------------------------------
template <class T, Op O, bool Ftz, bool Sat>
void exec_nearest(Warp& w, const Inst& in) {
  const T* a = w.src<T>(in.op[1]);
  const T* b = w.src<T>(in.op[arity(O) > 1 ? 2 : 1]);
  const T* c = w.src<T>(in.op[arity(O) > 2 ? 3 : 1]);
  T r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l) {
    T x = Ftz ? compute<T, O>(flush(a[l]), flush(b[l]), flush(c[l])) : compute<T, O>(a[l], b[l], c[l]);
    if (Ftz) x = flush(x);
    r[l] = Sat ? saturate01(x) : canonical(x);
  }
  blend(w.dst<T>(in.op[0]), r, w.exec);
}

// ---- f32, directed rounding -----------------------------------------------------
/// The exact result rounded to odd in double, from which any rounding to float is exact.
template <Op O>
double exact_odd(double a, double b, double c) {
  auto toward = [](double q, double residual) {  // sign of (exact - q) is that of residual
    if (residual == 0 || !std::isfinite(q)) return q;
    return fma_odd(1.0, q, std::copysign(std::numeric_limits<double>::denorm_min(), residual));
  };
  switch (O) {
    case Op::add:
      return fma_odd(a, 1.0, b);
    case Op::sub:
      return fma_odd(a, 1.0, -b);
    case Op::mul:
      return a * b;
    case Op::fma:
      return fma_odd(a, b, c);
    case Op::rcp:
      b = a, a = 1.0;
      [[fallthrough]];
    case Op::div: {
      const double q = a / b;
      return toward(q, std::fma(-q, b, a) * (b < 0 ? -1 : 1));
    }
    case Op::sqrt: {
      const double q = std::sqrt(a);
      return toward(q, std::fma(-q, q, a));
    }
  }
}

/// in.imm[0] = Round, imm[1] = ftz, imm[2] = sat
template <Op O>
void exec_directed(Warp& w, const Inst& in) {
  const float* a = w.src<float>(in.op[1]);
  const float* b = w.src<float>(in.op[arity(O) > 1 ? 2 : 1]);
  const float* c = w.src<float>(in.op[arity(O) > 2 ? 3 : 1]);
  const auto mode = static_cast<Round>(in.imm[0]);
  float r[kWarpSize];
  for_lanes(w.exec, [&](uint32_t l) {
    float x = a[l], y = b[l], z = c[l];
    if (in.imm[1]) x = flush(x), y = flush(y), z = flush(z);
    const double exact = exact_odd<O>(x, y, z);
    // An exact zero sum of opposite signs is -0 only when rounding down.
    float v = exact == 0 && (O == Op::add || O == Op::sub || O == Op::fma) && mode == Round::rm &&
                      compute<float, O>(x, y, z) == 0 && !std::signbit(compute<float, O>(-x, O == Op::fma ? y : -y, -z))
                  ? -0.0f
                  : round_to_float(exact, mode);
    if (in.imm[1]) v = flush(v);
    r[l] = in.imm[2] ? saturate01(v) : canonical(v);
  });
  blend(w.dst<float>(in.op[0]), r, w.exec);
}

// ---- f64, directed rounding: the host's own rounding modes ---------------------
template <Op O>
[[gnu::noinline]] double directed64(double a, double b, double c, int mode) {
  volatile double x = a, y = b, z = c;
  const int saved = std::fegetround();
  std::fesetround(mode);
  volatile double r = compute<double, O>(x, y, z);
  std::fesetround(saved);
  return r;
}
template <Op O>
void exec_directed64(Warp& w, const Inst& in) {
  const double* a = w.src<double>(in.op[1]);
  const double* b = w.src<double>(in.op[arity(O) > 1 ? 2 : 1]);
  const double* c = w.src<double>(in.op[arity(O) > 2 ? 3 : 1]);
  const auto mode = static_cast<Round>(in.imm[0]);
  const int host = mode == Round::rz ? FE_TOWARDZERO : mode == Round::rm ? FE_DOWNWARD : FE_UPWARD;
  double r[kWarpSize];
  for_lanes(w.exec, [&](uint32_t l) { r[l] = directed64<O>(a[l], b[l], c[l], host); });
  blend(w.dst<double>(in.op[0]), r, w.exec);
}

// ---- f16 and bf16: exact in double, then rounded once -----------------------------
enum Small : uint8_t { kFtz = 1, kSat = 2, kRelu = 4 };

template <class H, Op O>
H small_result(H a, H b, H c, uint8_t flags) {
  if (flags & kFtz) a = flush(a), b = flush(b), c = flush(c);
  const double x = to_float(a), y = to_float(b), z = to_float(c);
  double exact;
  switch (O) {
    case Op::add:
      exact = fma_odd(x, 1.0, y);
      break;
    case Op::sub:
      exact = fma_odd(x, 1.0, -y);
      break;
    case Op::mul:
      exact = x * y;
      break;
    default:
      exact = fma_odd(x, y, z);
      break;
  }
  float r = to_odd(exact);
  if (flags & kSat) r = saturate01(r);
  if ((flags & kRelu) && r <= 0) r = 0;
  H h = from_float(r, H{});
  if (flags & kFtz) h = flush(h);
  return h;
}

template <class H, Op O>
void exec_small(Warp& w, const Inst& in) {
  const H* a = w.src<H>(in.op[1]);
  const H* b = w.src<H>(in.op[arity(O) > 1 ? 2 : 1]);
  const H* c = w.src<H>(in.op[arity(O) > 2 ? 3 : 1]);
  H r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l) r[l] = small_result<H, O>(a[l], b[l], c[l], in.variant);
  blend(w.dst<H>(in.op[0]), r, w.exec);
}
template <class P, Op O>
void exec_packed(Warp& w, const Inst& in) {
  using H = typename Element<P>::type;
  const P* a = w.src<P>(in.op[1]);
  const P* b = w.src<P>(in.op[arity(O) > 1 ? 2 : 1]);
  const P* c = w.src<P>(in.op[arity(O) > 2 ? 3 : 1]);
  P r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l)
    r[l] = pack<P>(small_result<H, O>(low(a[l]), low(b[l]), low(c[l]), in.variant),
                   small_result<H, O>(high(a[l]), high(b[l]), high(c[l]), in.variant));
  blend(w.dst<P>(in.op[0]), r, w.exec);
}

/// Two f32 in a 64-bit register (sm_100 add.f32x2 etc.) are not supported.

template <Op O>
Handler nearest_approx(bool ftz, bool sat) {
  return ftz ? (sat ? approximate_lanes<exec_nearest<float, O, true, true>>
                    : approximate_lanes<exec_nearest<float, O, true, false>>)
             : (sat ? approximate_lanes<exec_nearest<float, O, false, true>>
                    : approximate_lanes<exec_nearest<float, O, false, false>>);
}

template <class T, Op O>
Handler nearest(bool ftz, bool sat) {
  return ftz ? (sat ? exec_nearest<T, O, true, true> : exec_nearest<T, O, true, false>)
             : (sat ? exec_nearest<T, O, false, true> : exec_nearest<T, O, false, false>);
}

template <Op O>
void decode_float(Decode& d) {
  const bool ftz = d.flag("ftz"), sat = d.flag("sat"), relu = d.flag("relu");
  const bool approx = !d.pick({"approx", "full"}).empty();
  const auto rounding = d.pick({"rn", "rz", "rm", "rp"});
  const Type t = d.type();
  d.expect_count(arity(O) + 1);
  d.out(0, t);
  for (size_t i = 1; i <= static_cast<size_t>(arity(O)); ++i) d.in(i, t);
  const Round mode = rounding == "rz"   ? Round::rz
                     : rounding == "rm" ? Round::rm
                     : rounding == "rp" ? Round::rp
                                        : Round::rn;
  const bool special = O == Op::div || O == Op::rcp || O == Op::sqrt;
  if (relu && !(O == Op::fma && size_of(t) <= 4 && t != Type::f32)) d.unsupported("relu");
  if (t == Type::f32) {
    if (mode == Round::rn) {
      d.exec(approx ? nearest_approx<O>(ftz, sat) : nearest<float, O>(ftz, sat),
             approx || (special && O != Op::div) ? InstClass::sfu : InstClass::fp32);
    } else {
      d.inst.imm[0] = static_cast<uint32_t>(mode);
      d.inst.imm[1] = ftz;
      d.inst.imm[2] = sat;
      d.exec(exec_directed<O>, InstClass::fp32);
    }
  } else if (t == Type::f64) {
    if (sat || approx) d.unsupported();
    if (mode == Round::rn)
      d.exec(nearest<double, O>(false, false), InstClass::fp64);
    else
      d.exec(exec_directed64<O>, InstClass::fp64);
    d.inst.imm[0] = static_cast<uint32_t>(mode);
  } else {
    if constexpr (O == Op::add || O == Op::sub || O == Op::mul || O == Op::fma) {
      if (mode != Round::rn) d.unsupported("rounding mode");
      d.inst.variant = static_cast<uint8_t>((ftz ? kFtz : 0) | (sat ? kSat : 0) | (relu ? kRelu : 0));
      switch (t) {
        case Type::f16:
          d.exec(exec_small<half, O>, InstClass::fp16);
          break;
        case Type::bf16:
          d.exec(exec_small<bfloat, O>, InstClass::fp16);
          break;
        case Type::f16x2:
          d.exec(exec_packed<half2, O>, InstClass::fp16);
          break;
        case Type::bf16x2:
          d.exec(exec_packed<bfloat2, O>, InstClass::fp16);
          break;
        default:
          d.unsupported();
      }
    } else {
      d.unsupported();
    }
  }
  d.finish();
}

bool integer_form(Decode& d) {
  for (std::string_view m : d.modifiers())
    if (const auto t = parse_type(m)) return is_int(*t) || *t == Type::u16x2 || *t == Type::s16x2;
  d.unsupported("no operand type");
}

void decode_add(Decode& d) { integer_form(d) ? integer::add(d) : decode_float<Op::add>(d); }
void decode_sub(Decode& d) { integer_form(d) ? integer::sub(d) : decode_float<Op::sub>(d); }
void decode_mul(Decode& d) { integer_form(d) ? integer::mul(d) : decode_float<Op::mul>(d); }
void decode_div(Decode& d) { integer_form(d) ? integer::div(d) : decode_float<Op::div>(d); }
void decode_mad(Decode& d) { integer_form(d) ? integer::mad(d) : decode_float<Op::fma>(d); }
void decode_fma(Decode& d) { decode_float<Op::fma>(d); }
void decode_sqrt(Decode& d) { decode_float<Op::sqrt>(d); }

/// rcp.approx.ftz.f64 delivers the upper half only.
double upper_half(double x) { return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & 0xffffffff00000000ull); }
double flush64(double x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0, x) : x; }
double rcp_approx64(double x) { return upper_half(flush64(1.0 / flush64(upper_half(x)))); }
double rsqrt_approx64(double x) { return upper_half(1.0 / std::sqrt(flush64(upper_half(x)))); }

void decode_rcp(Decode& d) {
  const auto& m = d.modifiers();
  if (m.size() == 3 && m[0] == "approx" && m[1] == "ftz" && m[2] == "f64") {
    d.flag("approx"), d.flag("ftz"), d.type();
    d.out(0, Type::f64);
    d.in(1, Type::f64);
    d.exec(map<rcp_approx64, double, double>, InstClass::fp64);
    return d.finish();
  }
  decode_float<Op::rcp>(d);
}

template <bool Ftz>
float rsqrt32(float x) {
  if (Ftz) x = flush(x);
  return canonical(static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))));
}
void decode_rsqrt(Decode& d) {
  if (!d.flag("approx")) d.unsupported();
  const bool ftz = d.flag("ftz");
  const Type t = d.type();
  d.expect_count(2);
  d.out(0, t);
  d.in(1, t);
  if (t == Type::f32)
    d.exec(ftz ? approximate_lanes<map<rsqrt32<true>, float, float>>
               : approximate_lanes<map<rsqrt32<false>, float, float>>,
           InstClass::sfu);
  else if (t == Type::f64)
    d.exec(map<rsqrt_approx64, double, double>, InstClass::fp64);
  else
    d.unsupported();
  d.finish();
}

}  // namespace

void register_minmax(OpcodeTable& t);
void register_transcendental(OpcodeTable& t);

void register_arithmetic(OpcodeTable& t) {
  t["add"] = decode_add;
  t["sub"] = decode_sub;
  t["mul"] = decode_mul;
  t["div"] = decode_div;
  t["mad"] = decode_mad;
  t["fma"] = decode_fma;
  t["rcp"] = decode_rcp;
  t["sqrt"] = decode_sqrt;
  t["rsqrt"] = decode_rsqrt;
  register_minmax(t);
  register_transcendental(t);
}

}  // namespace ptxsim
