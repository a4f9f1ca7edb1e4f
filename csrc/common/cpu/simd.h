// Vectors of the instruction set a file is compiled for. Every including file defines REMORA_CPU_ISA, the namespace of
// its copy, so that copies built with different flags never share a symbol; nothing here may be reached from a file
// that runs before the processor was checked.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef REMORA_CPU_ISA
#error "define REMORA_CPU_ISA before including simd.h"
#endif
#define REMORA_ALWAYS_INLINE __attribute__((always_inline))
#define REMORA_INLINE inline REMORA_ALWAYS_INLINE

namespace remora::REMORA_CPU_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kNumRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kNumRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kNumRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kNumRegisters = 16;
#endif

/// Storage of 16-bit floats; arithmetic happens after load() widened them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

/// Lanes of a vector of T.
template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int kLanes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <class T>
using Vec = typename VectorOf<T, kWidth<T>>::Type;

/// Calls f with the compile-time integers 0 .. N-1, so that arrays indexed by them live in registers.
template <int N, class F>
REMORA_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      REMORA_ALWAYS_INLINE { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

template <class T>
REMORA_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// ---- bit patterns of 16-bit floats, one lane at a time and W lanes at a time

using Half = VectorOf<uint16_t, kWidth<float>>::Type;  // as many 16-bit lanes as a vector has floats

REMORA_INLINE Vec<float> widen_bfloat16(Half h) {
  // The compiler's own conversion goes through two halves.
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)), 16));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)), 16));
#else
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(h, Vec<uint32_t>) << 16);
#endif
}

REMORA_INLINE Half narrow_bfloat16(Vec<float> x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Half>(_mm512_cvtneps_pbh(x));
#else
  const Vec<uint32_t> u = reinterpret_cast<Vec<uint32_t>>(x);
  const Vec<uint32_t> rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Vec<uint32_t> nan = (u >> 16) | 0x40;
  const Vec<uint32_t> result = (x == x) ? rounded : nan;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i wide = reinterpret_cast<__m256i>(result);
  return reinterpret_cast<Half>(_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
  return __builtin_convertvector(result, Half);
#endif
#endif
}

REMORA_INLINE Vec<float> widen_float16(Half h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#elif defined(__aarch64__)
  return vcvt_f32_f16(reinterpret_cast<float16x4_t>(h));
#else
  const Vec<uint32_t> u = __builtin_convertvector(h, Vec<uint32_t>);
  const Vec<uint32_t> magnitude = (u & 0x7fff) << 13;
  // The exponent is rebased by a multiplication, which also normalises subnormals; infinities and NaNs keep all ones.
  const Vec<uint32_t> finite = reinterpret_cast<Vec<uint32_t>>(reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f);
  const Vec<uint32_t> bits = ((u & 0x7c00) == 0x7c00) ? (magnitude | 0x7f800000u) : finite;
  return reinterpret_cast<Vec<float>>(bits | ((u & 0x8000) << 16));
#endif
}

REMORA_INLINE Half narrow_float16(Vec<float> x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Half>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<Half>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  return reinterpret_cast<Half>(vcvt_f16_f32(x));
#else
  const Vec<uint32_t> u = reinterpret_cast<Vec<uint32_t>>(x);
  const Vec<uint32_t> sign = (u >> 16) & 0x8000;
  const Vec<uint32_t> a = u & 0x7fffffff;
  const Vec<uint32_t> normal = (a - 0x38000000u + 0xfff + ((a >> 13) & 1)) >> 13;
  // Below 2^-14 adding 0.5 leaves the rounded subnormal in the low bits.
  const Vec<float> shifted = reinterpret_cast<Vec<float>>(a) + 0.5f;
  const Vec<uint32_t> subnormal = reinterpret_cast<Vec<uint32_t>>(shifted) - 0x3f000000u;
  const Vec<uint32_t> infinite = broadcast<uint32_t>(0x7c00);
  const Vec<uint32_t> nan = broadcast<uint32_t>(0x7e00);
  Vec<uint32_t> bits = (a < 0x38800000u) ? subnormal : normal;
  bits = (a >= 0x477ff000u) ? infinite : bits;
  bits = (a > 0x7f800000u) ? nan : bits;
  return __builtin_convertvector(bits | sign, Half);
#endif
}

// ---- loads and stores of kWidth<T> contiguous elements, converted from and to T; no alignment needed

template <class T, class E>
REMORA_INLINE Vec<T> load(const E* p) {
  if constexpr (std::is_same_v<T, E>) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  } else {
    Half h;
    __builtin_memcpy(&h, p, sizeof h);
    if constexpr (std::is_same_v<E, BFloat16>) {
      return widen_bfloat16(h);
    } else {
      return widen_float16(h);
    }
  }
}

template <class T, class E>
REMORA_INLINE void store(E* p, Vec<T> v) {
  if constexpr (std::is_same_v<T, E>) {
    __builtin_memcpy(p, &v, sizeof v);
  } else {
    Half h;
    if constexpr (std::is_same_v<E, BFloat16>) {
      h = narrow_bfloat16(v);
    } else {
      h = narrow_float16(v);
    }
    __builtin_memcpy(p, &h, sizeof h);
  }
}

/// Stores past the caches to an address aligned to the vector: for results that nobody reads soon, since a cached store
/// reads its line first. finish_streams() must follow before another thread may look.
template <class T>
REMORA_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#else
  store<T>(p, v);
#endif
}

REMORA_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

/// The first `lanes` elements, zeros behind them.
template <class T, class E>
REMORA_INLINE Vec<T> load_first(const E* p, int64_t lanes) {
  E buffer[kWidth<T>] = {};
  for (int64_t i = 0; i < lanes; ++i) buffer[i] = p[i];
  return load<T>(buffer);
}

template <class T, class E>
REMORA_INLINE void store_first(E* p, Vec<T> v, int64_t lanes) {
  E buffer[kWidth<T>];
  store<T>(buffer, v);
  for (int64_t i = 0; i < lanes; ++i) p[i] = buffer[i];
}

template <class T, class E>
REMORA_INLINE T load_one(const E* p) {
  if constexpr (std::is_same_v<T, E>) {
    return *p;
  } else {
    return load_first<T>(p, 1)[0];
  }
}

template <class T, class E>
REMORA_INLINE void store_one(E* p, T x) {
  if constexpr (std::is_same_v<T, E>) {
    *p = x;
  } else {
    store_first<T>(p, broadcast(x), 1);
  }
}

// ---- permutations and reductions

/// rows[i][j] becomes rows[j][i].
template <class V>
REMORA_INLINE void transpose(V* rows) {
  using T = std::remove_cvref_t<decltype(rows[0][0])>;
  constexpr int w = kWidth<T>;
  // Each pass interleaves rows i and i + w/2; log2(w) passes rotate the bits of the (row, lane) index by half.
  const auto pass = [](const V* from, V* to) REMORA_ALWAYS_INLINE {
    [&]<int... L>(std::integer_sequence<int, L...>) REMORA_ALWAYS_INLINE {
      unroll<w / 2>([&](auto i) REMORA_ALWAYS_INLINE {
        to[2 * i] = __builtin_shufflevector(from[i], from[i + w / 2], (L % 2 ? w + L / 2 : L / 2)...);
        to[2 * i + 1] =
            __builtin_shufflevector(from[i], from[i + w / 2], (L % 2 ? w + w / 2 + L / 2 : w / 2 + L / 2)...);
      });
    }(std::make_integer_sequence<int, w>{});
  };
  V other[w];
  if constexpr (w == 2) {
    pass(rows, other);
    unroll<w>([&](auto i) REMORA_ALWAYS_INLINE { rows[i] = other[i]; });
  } else if constexpr (w == 4) {
    pass(rows, other);
    pass(other, rows);
  } else if constexpr (w == 8) {
    pass(rows, other);
    pass(other, rows);
    pass(rows, other);
    unroll<w>([&](auto i) REMORA_ALWAYS_INLINE { rows[i] = other[i]; });
  } else {
    static_assert(w == 16);
    pass(rows, other);
    pass(other, rows);
    pass(rows, other);
    pass(other, rows);
  }
}

/// Lane i of the result is the sum of the lanes of rows[i]; destroys the rows.
template <class V>
REMORA_INLINE V sum_rows(V* rows) {
  using T = std::remove_cvref_t<decltype(rows[0][0])>;
  constexpr int w = kWidth<T>;
  // Every pass folds rows i and i + count into one whose lanes alternate between the two.
  const auto fold = [&]<int count>(std::integral_constant<int, count>) REMORA_ALWAYS_INLINE {
    [&]<int... L>(std::integer_sequence<int, L...>) REMORA_ALWAYS_INLINE {
      unroll<count>([&](auto i) REMORA_ALWAYS_INLINE {
        const V a = rows[i], b = rows[i + count];
        rows[i] = __builtin_shufflevector(a, b, (L % 2 ? w + L / 2 : L / 2)...) +
                  __builtin_shufflevector(a, b, (L % 2 ? w + w / 2 + L / 2 : w / 2 + L / 2)...);
      });
    }(std::make_integer_sequence<int, w>{});
  };
  if constexpr (w >= 16) fold(std::integral_constant<int, 8>{});
  if constexpr (w >= 8) fold(std::integral_constant<int, 4>{});
  if constexpr (w >= 4) fold(std::integral_constant<int, 2>{});
  fold(std::integral_constant<int, 1>{});
  return rows[0];
}

/// Sum of the lanes, by halves.
template <class T>
REMORA_INLINE T sum(Vec<T> v) {
  constexpr int w = kWidth<T>;
  const auto fold = [&]<int half>(std::integral_constant<int, half>) REMORA_ALWAYS_INLINE {
    [&]<int... L>(std::integer_sequence<int, L...>) REMORA_ALWAYS_INLINE {
      v += __builtin_shufflevector(v, v, ((L + half) % w)...);
    }(std::make_integer_sequence<int, w>{});
  };
  if constexpr (w >= 16) fold(std::integral_constant<int, 8>{});
  if constexpr (w >= 8) fold(std::integral_constant<int, 4>{});
  if constexpr (w >= 4) fold(std::integral_constant<int, 2>{});
  fold(std::integral_constant<int, 1>{});
  return v[0];
}

/// Bit i is set where lane i of a comparison holds.
template <class M>
REMORA_INLINE uint32_t mask_bits(M mask) {
  constexpr int w = sizeof(M) / sizeof(mask[0]);
#if defined(__AVX512DQ__)
  if constexpr (w == 16) return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
  if constexpr (w == 8) return _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask));
#endif
#if defined(__AVX__) && !defined(__AVX512F__)
  if constexpr (w == 8) return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
  if constexpr (w == 4) return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
#endif
  uint32_t bits = 0;
  for (int i = 0; i < w; ++i) bits |= static_cast<uint32_t>(mask[i] != 0) << i;
  return bits;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
/// Entry m names the set bits of m, lowest first, one per byte.
constexpr auto kSetBits = [] {
  struct {
    uint64_t of[256];
  } table{};
  for (int m = 0; m < 256; ++m) {
    for (int bit = 0, at = 0; bit < 8; ++bit) {
      if (m >> bit & 1) table.of[m] |= static_cast<uint64_t>(bit) << 8 * at++;
    }
  }
  return table;
}();
#endif

/// Appends the lanes of v whose bit is set to `to`, and `first` plus their numbers to `index`; returns how many. Both
/// must have room for a whole vector.
template <class V, class T>
REMORA_INLINE int64_t compress(T* to, int32_t* index, V v, int32_t first, uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    // Compressed in registers: the form with a memory operand is slow on some processors.
    const __m512i lanes = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(first));
    const __mmask16 mask = static_cast<__mmask16>(bits);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(v)));
    _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(mask, lanes));
    return __builtin_popcount(bits);
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kSetBits.of[bits])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(v), lanes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index), _mm256_add_epi32(lanes, _mm256_set1_epi32(first)));
    return __builtin_popcount(bits);
  }
#endif
  int64_t count = 0;
  for (; bits != 0; bits &= bits - 1, ++count) {
    const int lane = __builtin_ctz(bits);
    to[count] = v[lane], index[count] = first + lane;
  }
  return count;
}

/// Natural logarithm of a positive number that is not subnormal; infinity and NaN stay what they are.
REMORA_INLINE Vec<float> log_positive(Vec<float> x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)); log m by its odd series in (m - 1) / (m + 1)
  const Vec<int32_t> bits = reinterpret_cast<Vec<int32_t>>(x);
  const Vec<int32_t> e = (bits - 0x3f3504f3) >> 23;
  const Vec<float> m = reinterpret_cast<Vec<float>>(bits - (e << 23));
  const Vec<float> f = m - 1.0f, s = f / (m + 1.0f), z = s * s;
  Vec<float> p = broadcast(2.0f / 11);
  p = p * z + 2.0f / 9;
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  // log m = f - s (f - z p), whose largest term is exact
  const Vec<float> exponent = __builtin_convertvector(e, Vec<float>);
  const Vec<float> y = (f - s * (f - z * p)) + exponent * -2.12194440e-4f + exponent * 0.693359375f;
  return (x < __builtin_inff()) ? y : x;
}

REMORA_INLINE Vec<double> log_positive(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

/// Asks for a row that is read some microseconds later. Into L2: rows of a token tensor lie a power of two apart and
/// would evict each other from L1.
template <class E>
REMORA_INLINE void prefetch_row(const E* row, int64_t dims) {
  for (int64_t d = 0; d < dims; d += 64 / static_cast<int64_t>(sizeof(E))) __builtin_prefetch(row + d, 0, 2);
}

/// e^x for x <= 0; results below the smallest normal number are zero.
REMORA_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const Vec<float> magic = broadcast(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const Vec<float> clamped = (x < -88.0f) ? broadcast(-88.0f) : x;
  const Vec<float> shifted = clamped * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = broadcast(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec<uint32_t> exponent = reinterpret_cast<Vec<uint32_t>>(shifted) << 23;
  const Vec<float> y = reinterpret_cast<Vec<float>>(reinterpret_cast<Vec<uint32_t>>(p) + exponent);
  return (x < -87.3f) ? Vec<float>{} : y;
}

REMORA_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace remora::REMORA_CPU_ISA
