// Number formats: f16, bf16, tf32, fp8, and the rounding between them.
#pragma once
#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ptxsim {

enum class Round : uint8_t { rn, rz, rm, rp, rna };  // nearest even, zero, -inf, +inf, nearest away

// Distinct types, so that templates can tell the 16-bit formats apart.
struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};

constexpr uint16_t kHalfNan = 0x7fff;  // the canonical NaNs of the hardware
constexpr uint32_t kFloatNan = 0x7fffffff;

inline float canonical(float x) { return x != x ? std::bit_cast<float>(kFloatNan) : x; }
inline double canonical(double x) { return x; }

inline float flush(float x) {
  const uint32_t b = std::bit_cast<uint32_t>(x);
  return (b & 0x7f800000u) ? x : std::bit_cast<float>(b & 0x80000000u);
}

inline float to_float(half h) { return _cvtsh_ss(h.bits); }
inline float to_float(bfloat b) { return std::bit_cast<float>(uint32_t{b.bits} << 16); }
inline float to_float(float x) { return x; }

inline half to_half(float x) {
  if (x != x) return {kHalfNan};
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
inline bfloat to_bfloat(float x) {
  if (x != x) return {kHalfNan};
  const uint32_t b = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((b + 0x7fffu + (b >> 16 & 1)) >> 16)};
}

/// Rounds a double to float by truncation with the sticky bit in the last
/// place ("round to odd"): rounding that once more to a format at least two
/// bits narrower gives the correctly rounded result of the double.
inline float to_odd(double x) {
  float f = static_cast<float>(x);
  if (x != x || static_cast<double>(f) == x) return f;
  uint32_t b = std::bit_cast<uint32_t>(f);
  if (std::fabs(static_cast<double>(f)) > std::fabs(x)) --b;  // truncate the magnitude
  return std::bit_cast<float>(b | 1);
}

/// a*b + c in double, rounded to odd (a*b must be exact).
inline double fma_odd(double a, double b, double c) {
  const double p = a * b;
  const double s = p + c;
  if (!(std::fabs(s) < std::numeric_limits<double>::infinity())) return s;
  const double bb = s - p;
  const double err = (p - (s - bb)) + (c - bb);
  if (err == 0) return s;
  uint64_t bits = std::bit_cast<uint64_t>(s);
  if (bits & 1) return s;
  const bool toward_zero = (err < 0) == (s > 0);
  bits += toward_zero ? ~0ull : 1ull;
  return std::bit_cast<double>(bits);
}

/// A binary format with a sign bit, for the general rounding routine.
struct Format {
  int exponent_bits, mantissa_bits, bias;
  bool has_inf;  ///< IEEE-like infinities (e4m3 has none)
  uint32_t max_finite, nan;
  int bits() const { return 1 + exponent_bits + mantissa_bits; }
};
constexpr Format kF16{5, 10, 15, true, 0x7bff, 0x7fff};
constexpr Format kBf16{8, 7, 127, true, 0x7f7f, 0x7fff};
constexpr Format kTf32{8, 10, 127, true, 0x3fbff, 0x3ffff};  // bits 18..0 of the word >> 13
constexpr Format kE4m3{4, 3, 7, false, 0x7e, 0x7f};
constexpr Format kE5m2{5, 2, 15, true, 0x7b, 0x7f};

/// Correctly rounded conversion; `saturate` clamps to the largest finite value.
uint32_t encode(double x, const Format& f, Round mode, bool saturate);
double decode(uint32_t bits, const Format& f);

/// Double -> float in a rounding mode.
float round_to_float(double x, Round mode);
/// Rounds to an integral value.
double round_to_integral(double x, Round mode);

/// What a tensor core sees of a .tf32 operand: the low 13 bits are ignored.
inline float as_tf32(float x) { return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffffe000u); }

}  // namespace ptxsim
