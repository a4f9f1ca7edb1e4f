// ex2, lg2, sin, cos, tanh.
//
// The hardware's .approx results have errors of a few ulp that PTX bounds but
// does not specify; these return the correctly rounded (or nearly so) value,
// moved by the option approx_ulp.
#include "ops/float_lanes.h"
#include "ops/table.h"

namespace ptxsim {
namespace {

struct Ex2 {
  static float f(float x) { return std::exp2(x); }
};
struct Lg2 {
  static float f(float x) { return std::log2(x); }
};
struct Sin {
  static float f(float x) { return std::sin(x); }
};
struct Cos {
  static float f(float x) { return std::cos(x); }
};
struct Tanh {
  static float f(float x) { return std::tanh(x); }
};

template <class F, bool Ftz>
void exec32(Warp& w, const Inst& in) {
  const float* a = w.src<float>(in.op[1]);
  float r[kWarpSize];
  for_lanes(w.exec, [&](uint32_t l) {
    const float x = F::f(Ftz ? flush(a[l]) : a[l]);
    r[l] = canonical(Ftz ? flush(x) : x);
  });
  blend(w.dst<float>(in.op[0]), r, w.exec);
}
template <class F, class H>
void exec16(Warp& w, const Inst& in) {
  const H* a = w.src<H>(in.op[1]);
  H r[kWarpSize];
  for_lanes(w.exec, [&](uint32_t l) { r[l] = from_float(F::f(to_float(a[l])), H{}); });
  blend(w.dst<H>(in.op[0]), r, w.exec);
}
template <class F, class P>
void exec16x2(Warp& w, const Inst& in) {
  using H = typename Element<P>::type;
  const P* a = w.src<P>(in.op[1]);
  P r[kWarpSize];
  for_lanes(w.exec, [&](uint32_t l) {
    r[l] = pack<P>(from_float(F::f(to_float(low(a[l]))), H{}), from_float(F::f(to_float(high(a[l]))), H{}));
  });
  blend(w.dst<P>(in.op[0]), r, w.exec);
}

template <class F>
void decode(Decode& d) {
  if (!d.flag("approx")) d.unsupported("only .approx");
  const bool ftz = d.flag("ftz");
  const Type t = d.type();
  d.expect_count(2);
  d.out(0, t);
  d.in(1, t);
  switch (t) {
    case Type::f32:
      d.exec(ftz ? approximate_lanes<exec32<F, true>> : approximate_lanes<exec32<F, false>>, InstClass::sfu);
      break;
    case Type::f16:
      d.exec(exec16<F, half>, InstClass::sfu);
      break;
    case Type::bf16:
      d.exec(exec16<F, bfloat>, InstClass::sfu);
      break;
    case Type::f16x2:
      d.exec(exec16x2<F, half2>, InstClass::sfu);
      break;
    case Type::bf16x2:
      d.exec(exec16x2<F, bfloat2>, InstClass::sfu);
      break;
    default:
      d.unsupported();
  }
  d.finish();
}

}  // namespace

void register_transcendental(OpcodeTable& t) {
  t["ex2"] = decode<Ex2>;
  t["lg2"] = decode<Lg2>;
  t["sin"] = decode<Sin>;
  t["cos"] = decode<Cos>;
  t["tanh"] = decode<Tanh>;
}

}  // namespace ptxsim
