// Optimizers on row gradients, and the norm of one.
//
//   table, moment [N, d]   second [N, d] or [N]   rows [C]   values [C, d], the first U of them
//
// A CTA takes kSparseCtaRows rows: of the gradient, or of the table in dense mode, where it finds the gradients of its
// rows with one binary search. A warp updates a row at a time, a lane four columns at a time; the row-wise rules read
// the gradient twice, the second time from L1. Memory bound: README.md.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/philox.h"
#include "common/reduce.cuh"
#include "pkm/sparse_optim/params.h"

namespace remora {

constexpr int kSparseWarps = 8;
constexpr int kSparseThreads = 32 * kSparseWarps;
constexpr int kSparseCtaRows = 32;
constexpr int kNormCtaRows = 64;
constexpr int kSparseColumns = 4;  // of a lane at a time

/// Four columns of a row.
struct Columns {
  float v[kSparseColumns];
};

template <typename T>
union ColumnBits {
  uint4 bits16;
  uint2 bits8;
  T element[kSparseColumns];
};

template <typename T>
__device__ __forceinline__ Columns load_columns(const T* src, int num_valid, bool is_aligned) {
  ColumnBits<T> x;
  Columns out;
  if (is_aligned && num_valid == kSparseColumns) {
    if constexpr (sizeof(T) == 4) {
      x.bits16 = *reinterpret_cast<const uint4*>(src);
    } else {
      x.bits8 = *reinterpret_cast<const uint2*>(src);
    }
#pragma unroll
    for (int i = 0; i < kSparseColumns; ++i) out.v[i] = static_cast<float>(x.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSparseColumns; ++i) out.v[i] = i < num_valid ? static_cast<float>(src[i]) : 0.f;
  }
  return out;
}

template <typename T>
__device__ __forceinline__ void store_bits(T* dst, const ColumnBits<T>& x, int num_valid, bool is_aligned) {
  if (is_aligned && num_valid == kSparseColumns) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<uint4*>(dst) = x.bits16;
    } else {
      *reinterpret_cast<uint2*>(dst) = x.bits8;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSparseColumns; ++i) {
      if (i < num_valid) dst[i] = x.element[i];
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_columns(T* dst, const Columns& value, int num_valid, bool is_aligned) {
  ColumnBits<T> x;
#pragma unroll
  for (int i = 0; i < kSparseColumns; ++i) x.element[i] = static_cast<T>(value.v[i]);
  store_bits(dst, x, num_valid, is_aligned);
}

__device__ __forceinline__ int64_t num_gradient_rows(const RowGradient& g) {
  if (g.num_rows == nullptr) return g.capacity;
  const int64_t count =
      g.num_rows_is_int64 ? *static_cast<const int64_t*>(g.num_rows) : *static_cast<const int32_t*>(g.num_rows);
  return min(max(count, int64_t{0}), g.capacity);
}

__device__ __forceinline__ int64_t row_at(const SparseUpdateParams& p, int64_t i) {
  return p.rows_are_int64 ? static_cast<const int64_t*>(p.rows)[i] : static_cast<const int32_t*>(p.rows)[i];
}

/// First gradient row at or behind `slot`.
__device__ __forceinline__ int64_t lower_bound(const SparseUpdateParams& p, int64_t slot, int64_t num_rows) {
  int64_t low = 0, high = num_rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (row_at(p, middle) < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// x^n for n >= 0 by squaring: the same products on every device.
__device__ __forceinline__ double power(double x, int64_t n) {
  double y = 1;
  for (; n > 0; n /= 2, x *= x) y = n % 2 ? y * x : y;
  return y;
}

/// Four columns draw one block of the generator; its counter is (row, column / 4, step).
template <typename E>
__device__ __forceinline__ void store_weights(const SparseUpdateParams& p, E* dst, int64_t slot, int64_t column,
                                              const Columns& x, int num_valid, bool is_aligned) {
  if constexpr (sizeof(E) == 2) {
    if (p.stochastic_rounding) {
      const uint64_t block = static_cast<uint64_t>(p.column_offset + column) / kSparseColumns;
      const PhiloxWords random = philox({{static_cast<uint32_t>(slot), static_cast<uint32_t>(slot >> 32),
                                          static_cast<uint32_t>(block), static_cast<uint32_t>(p.step)}},
                                        p.seed);
      ColumnBits<uint16_t> bits;
#pragma unroll
      for (int i = 0; i < kSparseColumns; ++i) {
        bits.element[i] = round_bfloat16_stochastically(__float_as_uint(x.v[i]), random.word[i]);
      }
      store_bits(reinterpret_cast<uint16_t*>(dst), bits, num_valid, is_aligned);
      return;
    }
  }
  store_columns(dst, x, num_valid, is_aligned);
}

/// Calls body(column, num_valid) for the lane's columns of a row.
template <typename Body>
__device__ __forceinline__ void each_columns(int64_t dim, const Body& body) {
  for (int64_t c = threadIdx.x % 32 * kSparseColumns; c < dim; c += 32 * kSparseColumns) {
    body(c, static_cast<int>(min(dim - c, int64_t{kSparseColumns})));
  }
}

/// Sum of squares of a row, in every lane of the warp.
template <typename G>
__device__ __forceinline__ float sum_of_squares(const G* values, int64_t dim, float scale, bool is_aligned) {
  float squares = 0.f;
  each_columns(dim, [&](int64_t c, int num_valid) {
    const Columns x = load_columns(values + c, num_valid, is_aligned);
#pragma unroll
    for (int i = 0; i < kSparseColumns; ++i) squares = fmaf(x.v[i] * scale, x.v[i] * scale, squares);
  });
  return warp_sum(squares);
}

/// What a step multiplies the weights and moments of a row with.
struct RowFactors {
  float decay, missed1, missed2;
};

__device__ __forceinline__ RowFactors row_factors(const SparseUpdateParams& p, int64_t slot) {
  if (p.mode != SparseMode::kCatchUp) return {static_cast<float>(p.decay), 1.f, 1.f};
  const int64_t missed = max(p.step - 1 - p.last_step[slot], int64_t{0});
  const RowFactors factors = {static_cast<float>(p.decay * exp(p.log_decay - p.row_log_decay[slot])),
                              static_cast<float>(power(p.beta1, missed)), static_cast<float>(power(p.beta2, missed))};
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    p.last_step[slot] = static_cast<int32_t>(p.step);
    p.row_log_decay[slot] = p.log_decay + log(p.decay);
  }
  return factors;
}

/// One row, by a warp; `values` is null where its gradient is zero.
template <typename E, typename G, SparseRule RULE>
__device__ __forceinline__ void update_row(const SparseUpdateParams& p, int64_t slot, const G* values, float scale,
                                           bool is_aligned) {
  const int64_t dim = p.dim();
  const RowFactors factors = row_factors(p, slot);
  const float keep1 = static_cast<float>(p.beta1), new1 = static_cast<float>(1 - p.beta1);
  const float keep2 = static_cast<float>(p.beta2), new2 = static_cast<float>(1 - p.beta2);
  const float step_size = static_cast<float>(p.step_size), second_scale = static_cast<float>(p.second_scale);
  const float eps = static_cast<float>(p.eps);
  float row_rate = 0.f;
  if constexpr (RULE != SparseRule::kAdam) {
    float* second = static_cast<float*>(p.second) + slot;
    const float square =
        values != nullptr ? sum_of_squares(values, dim, scale, is_aligned) / static_cast<float>(dim) : 0.f;
    const float before = *second;
    __syncwarp();
    const float after =
        RULE == SparseRule::kRowwiseAdagrad ? before + square : keep2 * (before * factors.missed2) + new2 * square;
    if (threadIdx.x % 32 == 0) *second = after;
    row_rate = step_size / (sqrtf(after) * second_scale + eps);
  }
  E* weights = static_cast<E*>(p.table) + slot * dim;
  each_columns(dim, [&](int64_t c, int num_valid) {
    Columns g = {}, x = load_columns(weights + c, num_valid, is_aligned), m, v;
    if (values != nullptr) g = load_columns(values + c, num_valid, is_aligned);
    float* moment = static_cast<float*>(p.moment) + slot * dim + c;
    float* second = static_cast<float*>(p.second) + slot * dim + c;
    if constexpr (RULE != SparseRule::kRowwiseAdagrad) m = load_columns(moment, num_valid, is_aligned);
    if constexpr (RULE == SparseRule::kAdam) v = load_columns(second, num_valid, is_aligned);
#pragma unroll
    for (int i = 0; i < kSparseColumns; ++i) {
      const float gradient = g.v[i] * scale;
      x.v[i] *= factors.decay;
      if constexpr (RULE == SparseRule::kRowwiseAdagrad) {
        x.v[i] -= row_rate * gradient;
      } else {
        m.v[i] = keep1 * (m.v[i] * factors.missed1) + new1 * gradient;
        if constexpr (RULE == SparseRule::kAdam) {
          v.v[i] = keep2 * (v.v[i] * factors.missed2) + new2 * (gradient * gradient);
          x.v[i] -= step_size * m.v[i] / (sqrtf(v.v[i]) * second_scale + eps);
        } else {
          x.v[i] -= row_rate * m.v[i];
        }
      }
    }
    if constexpr (RULE != SparseRule::kRowwiseAdagrad) store_columns(moment, m, num_valid, is_aligned);
    if constexpr (RULE == SparseRule::kAdam) store_columns(second, v, num_valid, is_aligned);
    store_weights(p, weights + c, slot, c, x, num_valid, is_aligned);
  });
}

/// Grid: blocks of kSparseCtaRows rows, of the table in dense mode, else of the gradient.
template <typename E, typename G, SparseRule RULE>
__global__ void __launch_bounds__(kSparseThreads, 3)
    sparse_update_kernel(const __grid_constant__ SparseUpdateParams p, bool is_aligned) {
  __shared__ int64_t smem_slot[kSparseCtaRows];   // row of the table, or -1
  __shared__ int64_t smem_entry[kSparseCtaRows];  // its place in the gradient, or -1
  __shared__ int64_t smem_first;
  const int64_t num_rows = num_gradient_rows(p.gradient), first = int64_t{blockIdx.x} * kSparseCtaRows;
  const int thread_idx = threadIdx.x;

  if (p.mode == SparseMode::kDense) {
    if (thread_idx == 0) smem_first = lower_bound(p, first, num_rows);
    if (thread_idx < kSparseCtaRows) {
      smem_slot[thread_idx] = first + thread_idx < p.num_slots ? first + thread_idx : -1;
      smem_entry[thread_idx] = -1;
    }
    __syncthreads();
    const int64_t entry = smem_first + thread_idx;
    if (thread_idx < kSparseCtaRows && entry < num_rows) {
      const int64_t offset = row_at(p, entry) - first;
      if (offset >= 0 && offset < kSparseCtaRows) smem_entry[offset] = entry;
    }
  } else {
    if (first >= num_rows) return;
    if (thread_idx < kSparseCtaRows) {
      const int64_t entry = first + thread_idx, slot = entry < num_rows ? row_at(p, entry) : -1;
      smem_slot[thread_idx] = slot < p.num_slots ? slot : -1;
      smem_entry[thread_idx] = entry;
    }
  }
  __syncthreads();

  const float scale = p.grad_scale != nullptr ? *p.grad_scale : 1.f;
  for (int i = thread_idx / 32; i < kSparseCtaRows; i += kSparseWarps) {
    const int64_t slot = smem_slot[i], entry = smem_entry[i];
    if (slot < 0) continue;
    const G* values = entry < 0 ? nullptr : static_cast<const G*>(p.gradient.values) + entry * p.dim();
    update_row<E, G, RULE>(p, slot, values, scale, is_aligned);
  }
}

/// Leaves the sum of squares of each block of kNormCtaRows rows in the workspace. Grid: the blocks.
template <typename G>
__global__ void __launch_bounds__(kSparseThreads)
    row_norm_partial_kernel(const __grid_constant__ RowNormParams p, bool is_aligned) {
  __shared__ double smem_sums[kSparseWarps];
  const int64_t num_rows = num_gradient_rows(p.gradient), first = int64_t{blockIdx.x} * kNormCtaRows;
  const int warp_idx = threadIdx.x / 32;
  double total = 0;
  for (int64_t row = first + warp_idx; row < min(first + kNormCtaRows, num_rows); row += kSparseWarps) {
    const G* values = static_cast<const G*>(p.gradient.values) + row * p.gradient.dim;
    total += static_cast<double>(sum_of_squares(values, p.gradient.dim, 1.f, is_aligned));
  }
  if (threadIdx.x % 32 == 0) smem_sums[warp_idx] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0;
  for (int warp = 0; warp < kSparseWarps; ++warp) total += smem_sums[warp];
  static_cast<double*>(p.workspace)[blockIdx.x] = total;
}

/// Adds the blocks' sums in a fixed order. One CTA.
__global__ void __launch_bounds__(kSparseThreads)
    row_norm_kernel(const __grid_constant__ RowNormParams p, int64_t num_blocks) {
  __shared__ double smem_sums[kSparseThreads];
  double total = 0;
  for (int64_t block = threadIdx.x; block < num_blocks; block += kSparseThreads) {
    total += static_cast<const double*>(p.workspace)[block];
  }
  smem_sums[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  total = 0;
  for (int thread = 0; thread < kSparseThreads; ++thread) total += smem_sums[thread];
  *static_cast<float*>(p.norm) = static_cast<float>(sqrt(total));
}

}  // namespace remora
