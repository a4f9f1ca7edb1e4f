#include "ops/fragments.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <vector>

#include "ptxsim/error.h"

namespace ptxsim {
namespace {

std::array<float, 256> fp8_table(const Format& f) {
  std::array<float, 256> t;
  for (uint32_t i = 0; i < 256; ++i) t[i] = static_cast<float>(decode(i, f));
  return t;
}

}  // namespace

void convert_to_float(MmaType t, const void* src, float* dst, unsigned n) {
  switch (t) {
    case MmaType::f16: {
      const auto* s = static_cast<const uint16_t*>(src);
      unsigned i = 0;
      for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i))));
      for (; i < n; ++i) dst[i] = to_float(half{s[i]});
      return;
    }
    case MmaType::bf16: {
      const auto* s = static_cast<const uint16_t*>(src);
      for (unsigned i = 0; i < n; ++i) dst[i] = to_float(bfloat{s[i]});
      return;
    }
    case MmaType::tf32: {
      const auto* s = static_cast<const float*>(src);
      for (unsigned i = 0; i < n; ++i) dst[i] = as_tf32(s[i]);
      return;
    }
    case MmaType::e4m3:
    case MmaType::e5m2: {
      static const auto e4m3 = fp8_table(kE4m3), e5m2 = fp8_table(kE5m2);
      const auto& table = t == MmaType::e4m3 ? e4m3 : e5m2;
      const auto* s = static_cast<const uint8_t*>(src);
      for (unsigned i = 0; i < n; ++i) dst[i] = table[s[i]];
      return;
    }
    default:
      return;
  }
}

void convert_to_int(MmaType t, const void* src, int32_t* dst, unsigned n) {
  if (t == MmaType::s8)
    for (unsigned i = 0; i < n; ++i) dst[i] = static_cast<const int8_t*>(src)[i];
  else
    for (unsigned i = 0; i < n; ++i) dst[i] = static_cast<const uint8_t*>(src)[i];
}

namespace {

/// Sums in f32, fused multiply-adds in order of k.
void tile_fma(float* c, unsigned ldc, const float* a, unsigned lda, const float* b, unsigned ldb, unsigned m,
              unsigned n, unsigned k) {
  for (unsigned j = 0; j < n; j += 8) {
    for (unsigned i = 0; i < m; i += 8) {
      __m256 acc[8];
      for (unsigned r = 0; r < 8; ++r) acc[r] = _mm256_loadu_ps(c + (i + r) * ldc + j);
      for (unsigned q = 0; q < k; ++q) {
        const __m256 row = _mm256_loadu_ps(b + q * ldb + j);
        for (unsigned r = 0; r < 8; ++r)
          acc[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(a + (i + r) * lda + q), row, acc[r]);
      }
      for (unsigned r = 0; r < 8; ++r) _mm256_storeu_ps(c + (i + r) * ldc + j, acc[r]);
    }
  }
}

/// How a generation of tensor cores adds the products of one step: to the bits (MMA-Sim, arXiv 2511.10909).
struct FusedSum {
  unsigned step;      ///< products added at once
  int fraction_bits;  ///< kept below the largest exponent
};

FusedSum fused_sum(uint32_t arch, MmaType t, unsigned k) {
  if (arch < 80) fail("option mma=hardware: the sums of arch ", arch, " are not known");
  if (arch >= 90) return {k, 25};
  return {std::min(k, t == MmaType::tf32 ? 4u : 8u), 24};
}

constexpr int kNoExponent = -100000;  // of a zero, which aligns nothing

/// Exponent of the significand's unit digit: subnormals keep their type's smallest.
int exponent_of(float x, int smallest) {
  if (x == 0) return kNoExponent;
  const int e = static_cast<int>(std::bit_cast<uint32_t>(x) >> 23 & 0xff) - 127;
  return std::max(e, smallest);
}

double power_of_two(int e) { return std::bit_cast<double>(static_cast<uint64_t>(e + 1023) << 52); }

float toward_zero(double x) {
  const auto f = static_cast<float>(x);
  if (std::isinf(f) || std::fabs(static_cast<double>(f)) <= std::fabs(x)) return f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(f) - 1);
}

/// Keeps what rounding to f16 needs to know of the bits it drops.
float to_odd(double x) {
  const float f = toward_zero(x);
  return f == x || std::isinf(f) ? f : std::bit_cast<float>(std::bit_cast<uint32_t>(f) | 1);
}

/// The terms of a step, products and C, are aligned to the largest exponent, truncated, and added exactly; the sum is
/// truncated to f32. Eight columns at a time.
void tile_fused(FusedSum rule, MmaType t, bool half_sum, float* c, unsigned ldc, const float* a, unsigned lda,
                const float* b, unsigned ldb, unsigned m, unsigned n, unsigned k) {
  constexpr unsigned kWide = 8;
  const int smallest = t == MmaType::f16 ? -14 : -126;
  std::vector<int> exponents(size_t{k} * n);
  for (unsigned q = 0; q < k; ++q)
    for (unsigned j = 0; j < n; ++j) exponents[q * n + j] = exponent_of(b[q * ldb + j], smallest);
  for (unsigned i = 0; i < m; ++i)
    for (unsigned j = 0; j < n; j += kWide)
      for (unsigned first = 0; first < k; first += rule.step) {
        const unsigned last = std::min(k, first + rule.step);
        float* sum = c + i * ldc + j;
        int top[kWide];
        for (unsigned e = 0; e < kWide; ++e) top[e] = exponent_of(sum[e], -126);
        for (unsigned q = first; q < last; ++q) {
          const int row = exponent_of(a[i * lda + q], smallest);
          for (unsigned e = 0; e < kWide; ++e) top[e] = std::max(top[e], row + exponents[q * n + j + e]);
        }
        double unit[kWide], total[kWide];
        for (unsigned e = 0; e < kWide; ++e) {
          top[e] = std::max(top[e], -600);  // all terms are zero
          unit[e] = power_of_two(rule.fraction_bits - top[e]);
          total[e] = std::trunc(double{sum[e]} * unit[e]);
        }
        for (unsigned q = first; q < last; ++q) {
          const double row = a[i * lda + q];
          for (unsigned e = 0; e < kWide; ++e) total[e] += std::trunc(row * double{b[q * ldb + j + e]} * unit[e]);
        }
        for (unsigned e = 0; e < kWide; ++e) {
          const double exact = total[e] * power_of_two(top[e] - rule.fraction_bits);
          sum[e] = half_sum ? to_odd(exact) : toward_zero(exact);
        }
      }
}

}  // namespace

void multiply_tile(const Options& options, MmaType t, bool half_sum, float* c, unsigned ldc, const float* a,
                   unsigned lda, const float* b, unsigned ldb, unsigned m, unsigned n, unsigned k) {
  const bool ruled = t == MmaType::f16 || t == MmaType::bf16 || t == MmaType::tf32;
  if (options.mma == MmaMode::hardware && ruled)
    tile_fused(fused_sum(options.arch, t, k), t, half_sum, c, ldc, a, lda, b, ldb, m, n, k);
  else
    tile_fma(c, ldc, a, lda, b, ldb, m, n, k);
}

}  // namespace ptxsim
