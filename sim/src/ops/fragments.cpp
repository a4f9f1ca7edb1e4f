#include "ops/fragments.h"

#include <array>

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

}  // namespace ptxsim
