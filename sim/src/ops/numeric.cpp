#include "ops/numeric.h"

#include <algorithm>

namespace ptxsim {
namespace {

/// Rounds a non-negative scaled magnitude to an integer.
double round_magnitude(double q, bool negative, Round mode) {
  const double low = std::floor(q), rest = q - low;
  if (rest == 0) return low;
  switch (mode) {
    case Round::rn:
      return rest > 0.5 || (rest == 0.5 && std::fmod(low, 2) != 0) ? low + 1 : low;
    case Round::rna:
      return rest >= 0.5 ? low + 1 : low;
    case Round::rz:
      return low;
    case Round::rm:
      return negative ? low + 1 : low;
    case Round::rp:
      return negative ? low : low + 1;
  }
  return low;
}

}  // namespace

uint32_t encode(double x, const Format& f, Round mode, bool saturate) {
  const uint32_t sign = std::signbit(x) ? 1u << (f.exponent_bits + f.mantissa_bits) : 0;
  if (x != x) return f.nan;
  const double a = std::fabs(x);
  const uint32_t infinity = ((1u << f.exponent_bits) - 1) << f.mantissa_bits;
  if (std::isinf(a)) return sign | (saturate ? f.max_finite : f.has_inf ? infinity : f.nan);
  if (a == 0) return sign;
  const int smallest = 1 - f.bias;
  int e = std::max(std::ilogb(a), smallest);
  double n = round_magnitude(std::ldexp(a, f.mantissa_bits - e), sign != 0, mode);
  const double one = std::ldexp(1.0, f.mantissa_bits);
  if (n >= 2 * one) n /= 2, ++e;
  const uint64_t biased = n >= one ? static_cast<uint64_t>(e + f.bias) : 0;
  const uint64_t bits = biased << f.mantissa_bits | (static_cast<uint64_t>(n) & (static_cast<uint64_t>(one) - 1));
  if (bits <= f.max_finite) return sign | static_cast<uint32_t>(bits);
  const bool to_max = saturate || mode == Round::rz || (mode == Round::rm && !sign) || (mode == Round::rp && sign);
  return sign | (to_max ? f.max_finite : f.has_inf ? infinity : f.nan);
}

double decode(uint32_t bits, const Format& f) {
  const uint32_t mantissa = bits & ((1u << f.mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> f.mantissa_bits & ((1u << f.exponent_bits) - 1));
  const bool negative = bits >> (f.exponent_bits + f.mantissa_bits) & 1;
  const uint32_t magnitude = bits & ((1u << (f.exponent_bits + f.mantissa_bits)) - 1);
  double v;
  if (f.has_inf && exponent == (1 << f.exponent_bits) - 1)
    v = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  else if (!f.has_inf && magnitude == f.nan)
    v = std::numeric_limits<double>::quiet_NaN();
  else if (exponent == 0)
    v = std::ldexp(mantissa, 1 - f.bias - f.mantissa_bits);
  else
    v = std::ldexp(mantissa + (1u << f.mantissa_bits), exponent - f.bias - f.mantissa_bits);
  return negative ? -v : v;
}

float round_to_float(double x, Round mode) {
  const auto nearest = static_cast<float>(x);
  if (x != x || mode == Round::rn || static_cast<double>(nearest) == x) return nearest;
  const bool above = static_cast<double>(nearest) > x;
  const float inf = std::numeric_limits<float>::infinity();
  switch (mode) {
    case Round::rm:
      return above ? std::nextafter(nearest, -inf) : nearest;
    case Round::rp:
      return above ? nearest : std::nextafter(nearest, inf);
    case Round::rz:
      return x > 0 ? (above ? std::nextafter(nearest, -inf) : nearest)
                   : (above ? nearest : std::nextafter(nearest, inf));
    default:
      return nearest;
  }
}

double round_to_integral(double x, Round mode) {
  switch (mode) {
    case Round::rn:
      return std::nearbyint(x);
    case Round::rna:
      return std::round(x);
    case Round::rz:
      return std::trunc(x);
    case Round::rm:
      return std::floor(x);
    case Round::rp:
      return std::ceil(x);
  }
  return x;
}

}  // namespace ptxsim
