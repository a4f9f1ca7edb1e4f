// Templates that make a handler out of a scalar function.
//
// map<F, D, S...> applies F to every lane: all 32 are computed, which lets the
// compiler vectorise, and only the executing lanes are written. F must
// therefore be harmless for the garbage in inactive lanes.
#pragma once
#include <immintrin.h>

#include "sim/decoder.h"
#include "sim/warp.h"

namespace ptxsim {

template <auto F, class D, class A>
void map(Warp& w, const Inst& in) {
  const A* a = w.src<A>(in.op[1]);
  D r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l) r[l] = F(a[l]);
  blend(w.dst<D>(in.op[0]), r, w.exec);
}

template <auto F, class D, class A, class B>
void map(Warp& w, const Inst& in) {
  const A* a = w.src<A>(in.op[1]);
  const B* b = w.src<B>(in.op[2]);
  D r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l) r[l] = F(a[l], b[l]);
  blend(w.dst<D>(in.op[0]), r, w.exec);
}

template <auto F, class D, class A, class B, class C>
void map(Warp& w, const Inst& in) {
  const A* a = w.src<A>(in.op[1]);
  const B* b = w.src<B>(in.op[2]);
  const C* c = w.src<C>(in.op[3]);
  D r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l) r[l] = F(a[l], b[l], c[l]);
  blend(w.dst<D>(in.op[0]), r, w.exec);
}

/// Lanes whose value is nonzero, as a mask.
inline uint32_t pack_mask(const int32_t* v) {
  uint32_t m = 0;
  for (int i = 0; i < 4; ++i) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + 8 * i));
    m |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x))) << (8 * i);
  }
  return m;
}

/// Lane mask of a predicate function.
template <auto F, class A>
uint32_t test(const A* a, const A* b) {
  alignas(32) int32_t r[kWarpSize];
  for (uint32_t l = 0; l < kWarpSize; ++l) r[l] = F(a[l], b[l]) ? -1 : 0;
  return pack_mask(r);
}

}  // namespace ptxsim
