// Functions of vectors, and rows of any length read and written as vectors.
#pragma once
#include "common/cpu/simd.h"

namespace remora::REMORA_CPU_ISA {

/// Elements d ... of `lanes` in all; zeros behind them.
template <class T, class E>
REMORA_INLINE Vec<T> load_lanes(const E* p, int64_t d, int64_t lanes) {
  return d + kWidth<T> <= lanes ? load<T>(p + d) : load_first<T>(p + d, lanes - d);
}
template <class T, class E>
REMORA_INLINE void store_lanes(E* p, int64_t d, int64_t lanes, Vec<T> x) {
  if (d + kWidth<T> <= lanes) {
    store<T>(p + d, x);
  } else {
    store_first<T>(p + d, x, lanes - d);
  }
}

/// x / y for y in [1, 4], to the last bit but one: division proper takes as long as twenty other instructions.
template <class T>
REMORA_INLINE Vec<T> divide_near_one(Vec<T> x, Vec<T> y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    Vec<T> r = _mm512_rcp14_ps(y);
    r += r * (T(1) - y * r);
    const Vec<T> q = x * r;
    return q + r * (x - y * q);
  }
#endif
  return x / y;
}

template <class T>
REMORA_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_nonpositive(x < T(0) ? x : -x);
  return divide_near_one<T>(x < T(0) ? e : broadcast(T(1)), T(1) + e);
}

/// 2^x for any x: results below the smallest normal number may lose digits, those above the largest are infinite.
REMORA_INLINE Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512DQ__)
  const Vec<float> r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 of an infinity
#else
  const Vec<float> magic = broadcast(12582912.0f);
  x = (x < -127.0f) ? broadcast(-127.0f) : x;
  x = (x > 128.0f) ? broadcast(128.0f) : x;
  const Vec<float> shifted = x + magic;
  const Vec<float> r = x - (shifted - magic);
#endif
  // 2^r on [-1/2, 1/2] to 1e-7, and 1 at 0, so that a decay by little keeps its distance from 1.
  Vec<float> p = broadcast(1.32647273e-3f);
  p = p * r + 9.67151299e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512DQ__)
  return _mm512_scalef_ps(p, x - r);
#else
  return reinterpret_cast<Vec<float> >(reinterpret_cast<Vec<uint32_t> >(p) +
                                       (reinterpret_cast<Vec<uint32_t> >(shifted) << 23));
#endif
}

REMORA_INLINE Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

/// log(1 + e^x), and x itself above 20.
REMORA_INLINE Vec<float> softplus(Vec<float> x) {
  const Vec<float> e = exp_nonpositive(x < 0.f ? x : -x);
  // log(1 + e) = 2 atanh(e / (2 + e)), whose argument is at most 1/3.
  const Vec<float> s = divide_near_one<float>(e, 2.f + e), s2 = s * s;
  Vec<float> p = broadcast(1.f / 15);
  p = p * s2 + 1.f / 13;
  p = p * s2 + 1.f / 11;
  p = p * s2 + 1.f / 9;
  p = p * s2 + 1.f / 7;
  p = p * s2 + 1.f / 5;
  p = p * s2 + 1.f / 3;
  p = p * s2 + 1.f;
  return (x > 0.f ? x : Vec<float>{}) + 2.f * s * p;
}

REMORA_INLINE Vec<double> softplus(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = x[i] > 20 ? x[i] : std::log1p(std::exp(x[i]));
  return x;
}

}  // namespace remora::REMORA_CPU_ISA
