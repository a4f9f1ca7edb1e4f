// Scalar building blocks of the floating-point handlers.
#pragma once
#include <bit>
#include <cmath>
#include <limits>

#include "ops/lanes.h"
#include "ops/numeric.h"
#include "sim/launch.h"

namespace ptxsim {

struct half2 {
  uint32_t bits;
};  ///< two halves, low first
struct bfloat2 {
  uint32_t bits;
};

inline half from_float(float x, half) { return to_half(x); }
inline bfloat from_float(float x, bfloat) { return to_bfloat(x); }

/// The element type of a packed pair.
template <class P>
struct Element;
template <>
struct Element<half2> {
  using type = half;
};
template <>
struct Element<bfloat2> {
  using type = bfloat;
};

template <class P>
typename Element<P>::type low(P p) {
  return {static_cast<uint16_t>(p.bits)};
}
template <class P>
typename Element<P>::type high(P p) {
  return {static_cast<uint16_t>(p.bits >> 16)};
}
template <class P>
P pack(typename Element<P>::type lo, typename Element<P>::type hi) {
  return {uint32_t{hi.bits} << 16 | lo.bits};
}

/// The result of an f32 .approx function moved by up to `ulp` units in the last place, the same for the same result.
/// Powers of two stay: the hardware's functions are exact where they must be, as for ex2(0).
inline float approximate(float x, uint32_t ulp, uint32_t seed) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t exponent = bits >> 23 & 0xff;
  if (exponent < 2 || exponent > 253 || (bits & 0x7fffff) == 0) return x;
  const uint64_t hash = (uint64_t{bits} * 2654435761u + seed) * 0x9e3779b97f4a7c15u;
  return std::bit_cast<float>(bits + static_cast<uint32_t>((hash >> 32) % (2 * uint64_t{ulp} + 1)) - ulp);
}

/// A handler of an f32 .approx instruction, with the option approx_ulp.
template <auto Exact>
void approximate_lanes(Warp& w, const Inst& in) {
  Exact(w, in);
  const Options& o = w.launch->options;
  if (o.approx_ulp == 0) return;
  auto* r = w.dst<float>(in.op[0]);
  for_lanes(w.exec, [&](uint32_t l) { r[l] = approximate(r[l], o.approx_ulp, o.seed); });
}

inline half flush(half h) { return (h.bits & 0x7c00) ? h : half{static_cast<uint16_t>(h.bits & 0x8000)}; }
inline bfloat flush(bfloat h) { return (h.bits & 0x7f80) ? h : bfloat{static_cast<uint16_t>(h.bits & 0x8000)}; }
inline double flush(double x) { return x; }

template <class T>
T saturate01(T x) {
  return x > T{0} ? (x < T{1} ? x : T{1}) : T{0};
}  // NaN -> +0

// min and max: -0 is below +0, a NaN loses against a number.
template <class T>
T min_number(T a, T b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T max_number(T a, T b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a < b ? b : a;
}

}  // namespace ptxsim
