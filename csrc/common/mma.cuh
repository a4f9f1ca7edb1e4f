// Matrix products of one warp, D[16, 8] += A[16, 16] B[16, 8], with the same fragments for every element type.
//
// Lane l holds, with row = l / 4 and col = 2 (l % 4):
//   C   {row, col}, {row, col + 1}, {row + 8, col}, {row + 8, col + 1}
//   A   the elements of two C fragments side by side, in that order: a C fragment pair becomes an A fragment in place
//   B   {k = col, n = row}, {col + 1, row}, {col + 8, row}, {col + 9, row}
// bfloat16 and half: mma.m16n8k16. float: two mma.m16n8k8 in tf32 whose k index is permuted to that layout; every
// operand is split in two tf32 numbers and the three larger products are summed (relative error about 2^-21). Tensor
// cores truncate where they add: sums of many products that cancel go through mma_rounded.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace remora {

template <typename T>
struct FragA {
  uint32_t r[4];
};
template <>
struct FragA<float> {
  float r[8];
};

template <typename T>
struct FragB {
  uint32_t r[2];
};
template <>
struct FragB<float> {
  float r[4];
};

struct FragC {
  float r[4];
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float lo, float hi) {
  __nv_bfloat162 x = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<uint32_t&>(x);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float lo, float hi) {
  __half2 x = __floats2half2_rn(lo, hi);
  return reinterpret_cast<uint32_t&>(x);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t x);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t x) {
  return __half22float2(reinterpret_cast<__half2&>(x));
}

/// The A fragment of [lo | hi], two C fragments of neighbouring columns.
template <typename T>
__device__ __forceinline__ FragA<T> make_a(const FragC& lo, const FragC& hi) {
  FragA<T> a;
  a.r[0] = pack<T>(lo.r[0], lo.r[1]);
  a.r[1] = pack<T>(lo.r[2], lo.r[3]);
  a.r[2] = pack<T>(hi.r[0], hi.r[1]);
  a.r[3] = pack<T>(hi.r[2], hi.r[3]);
  return a;
}
template <>
__device__ __forceinline__ FragA<float> make_a<float>(const FragC& lo, const FragC& hi) {
  return {{lo.r[0], lo.r[1], lo.r[2], lo.r[3], hi.r[0], hi.r[1], hi.r[2], hi.r[3]}};
}

/// Element pair `pair` (0..3) of an A fragment: rows row, row + 8, row, row + 8; columns col, col, col + 8, col + 8.
template <typename T>
__device__ __forceinline__ float2 pair_of(const FragA<T>& a, int pair) {
  return unpack<T>(a.r[pair]);
}
template <>
__device__ __forceinline__ float2 pair_of<float>(const FragA<float>& a, int pair) {
  return {a.r[2 * pair], a.r[2 * pair + 1]};
}
template <typename T>
__device__ __forceinline__ void set_pair(FragA<T>& a, int pair, float2 x) {
  a.r[pair] = pack<T>(x.x, x.y);
}
template <>
__device__ __forceinline__ void set_pair<float>(FragA<float>& a, int pair, float2 x) {
  a.r[2 * pair] = x.x;
  a.r[2 * pair + 1] = x.y;
}

/// Columns [8 half, 8 half + 8) of the transpose of A as a B fragment: the same registers.
template <typename T>
__device__ __forceinline__ FragB<T> transposed_half(const FragA<T>& a, int half) {
  return {{a.r[half], a.r[half + 2]}};
}
template <>
__device__ __forceinline__ FragB<float> transposed_half<float>(const FragA<float>& a, int half) {
  return {{a.r[2 * half], a.r[2 * half + 1], a.r[2 * half + 4], a.r[2 * half + 5]}};
}

__device__ __forceinline__ void mma(FragC& c, const FragA<__nv_bfloat16>& a, const FragB<__nv_bfloat16>& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.r[0]), "+f"(c.r[1]), "+f"(c.r[2]), "+f"(c.r[3])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}

__device__ __forceinline__ void mma(FragC& c, const FragA<__half>& a, const FragB<__half>& b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c.r[0]), "+f"(c.r[1]), "+f"(c.r[2]), "+f"(c.r[3])
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}

__device__ __forceinline__ void mma_k8_tf32(FragC& c, float a0, float a1, float a2, float a3, float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.r[0]), "+f"(c.r[1]), "+f"(c.r[2]), "+f"(c.r[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

/// One product in tf32 (operands truncated to 11 bits).
__device__ __forceinline__ void mma_tf32(FragC& c, const FragA<float>& a, const FragB<float>& b) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const float* x = a.r + 4 * s;
    mma_k8_tf32(c, x[0], x[2], x[1], x[3], b.r[2 * s], b.r[2 * s + 1]);
  }
}

/// x in 32 bits that the tensor core truncates to the tf32 number nearest to x. Finite x only: a NaN may become zero.
__device__ __forceinline__ float tf32_nearest(float x) { return __uint_as_float(__float_as_uint(x) + 0x1000u); }

/// The tf32 number nearest to x; x - tf32_head(x) is exact and has no preferred sign.
__device__ __forceinline__ float tf32_head(float x) {
  return __uint_as_float(__float_as_uint(tf32_nearest(x)) & 0xffffe000u);
}

__device__ __forceinline__ void mma(FragC& c, const FragA<float>& a, const FragB<float>& b) {
  FragA<float> a_head, a_tail;
  FragB<float> b_head, b_tail;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    a_head.r[i] = tf32_head(a.r[i]);
    a_tail.r[i] = a.r[i] - a_head.r[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    b_head.r[i] = tf32_head(b.r[i]);
    b_tail.r[i] = b.r[i] - b_head.r[i];
  }
  mma_tf32(c, a_tail, b_head);
  mma_tf32(c, a_head, b_tail);
  mma_tf32(c, a_head, b_head);
}

/// c += a b + ... of further pairs (a, b). float: the sum of the products reaches c rounded to nearest.
template <typename T, typename... Pairs>
__device__ __forceinline__ void mma_rounded(FragC& c, const FragA<T>& a, const FragB<T>& b, const Pairs&... pairs) {
  if constexpr (sizeof(T) == 4) {
    FragC sum = {};
    const auto add = [&sum](const auto& self, const FragA<T>& x, const FragB<T>& y, const auto&... rest) {
      mma(sum, x, y);
      if constexpr (sizeof...(rest) > 0) self(self, rest...);
    };
    add(add, a, b, pairs...);
#pragma unroll
    for (int i = 0; i < 4; ++i) c.r[i] += sum.r[i];
  } else {
    mma(c, a, b);
    if constexpr (sizeof...(pairs) > 0) mma_rounded(c, pairs...);
  }
}

/// Transpose of an 8x8 matrix of 16-bit elements spread over the warp: lane l gives and gets row l / 4, columns
/// 2 (l % 4) and the next.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace remora
