// Scalar building blocks of the floating-point handlers.
#pragma once
#include <cmath>
#include <limits>

#include "ops/lanes.h"
#include "ops/numeric.h"

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
