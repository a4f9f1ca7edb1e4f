// Matrix fragments in registers, and the multiply-accumulate on tiles.
//
// All mma.sync fragments follow one rule: a register, over the 32 lanes, is an
// 8 x 4E block stored row by row (E = elements per register): lane l holds
// elements E*(l%4) ... of row l/4. B blocks are transposed (row = n).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "ops/float_lanes.h"
#include "ptxsim/options.h"

namespace ptxsim {

/// What tensor cores do to an element before multiplying.
enum class MmaType : uint8_t { f16, bf16, tf32, f64, s8, u8, e4m3, e5m2 };

constexpr unsigned mma_element_bytes(MmaType t) {
  switch (t) {
    case MmaType::f16:
    case MmaType::bf16:
      return 2;
    case MmaType::tf32:
      return 4;
    case MmaType::f64:
      return 8;
    default:
      return 1;
  }
}

/// Converts n elements of type t to float (not for f64).
void convert_to_float(MmaType t, const void* src, float* dst, unsigned n);
void convert_to_int(MmaType t, const void* src, int32_t* dst, unsigned n);

/// C[m][n] += A[m][k] * B[k][n] for elements of type `t` already converted; n is a multiple of 8. `options.mma` says
/// how products are summed; `half_sum`: C is rounded to f16 afterwards.
void multiply_tile(const Options& options, MmaType t, bool half_sum, float* c, unsigned ldc, const float* a,
                   unsigned lda, const float* b, unsigned ldb, unsigned m, unsigned n, unsigned k);

}  // namespace ptxsim
