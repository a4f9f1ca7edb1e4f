// Copies from global to shared memory: cp.async in 16- and 4-byte pieces with zero fill, element-wise where the tensor
// is not 16-byte aligned.
#pragma once
#include "common/smem_tile.cuh"

namespace remora {

/// Copies 16 bytes, or writes zeros if not valid; `src` must be readable memory's address only if valid.
__device__ __forceinline__ void cp_async_16(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_4(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most kPending of this thread's committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Sixteen bytes of a row that may begin anywhere and end within them; zeros from element `num_valid` on.
template <typename T>
__device__ __forceinline__ uint4 load_unaligned_16(const T* src, int num_valid) {
  constexpr int kCount = 16 / sizeof(T);
  union {
    uint4 vector;
    T element[kCount];
  } x;
  x.vector = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < num_valid) x.element[i] = src[i];
  }
  return x.vector;
}

/// Rows [0, num_rows) and columns [0, num_cols) of a matrix with contiguous rows to a swizzled tile of ROWS x COLS,
/// zeros elsewhere, by kNumThreads threads. `is_aligned`: src, stride_row and num_cols allow 16-byte pieces.
template <typename T, int ROWS, int COLS, int kNumThreads>
__device__ __forceinline__ void copy_tile_async(uint32_t dst, const T* src, int64_t stride_row, int num_rows,
                                                int num_cols, bool is_aligned, int thread_idx) {
  using Tile = SmemTile<T, COLS>;
  constexpr int kElements = 16 / sizeof(T);
  constexpr int kUnits = COLS / kElements;
  static_assert(kUnits <= kNumThreads && kNumThreads % kUnits == 0, "a thread keeps its column");
  constexpr int kRowStep = kNumThreads / kUnits < ROWS ? kNumThreads / kUnits : ROWS;
  static_assert(ROWS % kRowStep == 0);
  const int col = thread_idx % kUnits * kElements;
  const int first_row = thread_idx / kUnits;
  if (kRowStep * kUnits < kNumThreads && first_row >= ROWS) return;
  const T* src_col = src + col;
  // The swizzle repeats every 8 rows, so all but a few addresses differ by constants.
  const auto dst_of = [&](int i) {
    return dst + Tile::offset(first_row + i * kRowStep % 8, col) + i * kRowStep / 8 * 8 * Tile::ROW_SIZE;
  };
  if (is_aligned && num_rows >= ROWS && num_cols == COLS) {
    // No more copies of the body than it takes to repeat the swizzle: the instruction cache is small.
    constexpr int kCount = ROWS / kRowStep,
                  kUnroll = kCount > 4 && 4 * kRowStep % 8 == 0 && kCount % 4 == 0 ? 4 : kCount;
    const T* src_row = src_col + first_row * stride_row;
#pragma unroll 1
    for (int i = 0; i < kCount; i += kUnroll) {
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        cp_async_16(dst_of(j) + i * kRowStep * Tile::ROW_SIZE, src_row, true);
        src_row += kRowStep * stride_row;
      }
    }
  } else if (is_aligned) {
#pragma unroll 1
    for (int i = 0; i < ROWS / kRowStep; ++i) {
      const int row = first_row + i * kRowStep;
      const bool valid = row < num_rows && col < num_cols;
      cp_async_16(dst + Tile::offset(row, col), valid ? src_col + row * stride_row : src, valid);
    }
  } else {
    // Rare and slow anyway: rolled up, for the sake of the instruction cache.
#pragma unroll 1
    for (int row = first_row; row < ROWS; row += kRowStep) {
      const int num_valid = row < num_rows ? num_cols - col : 0;
      store_shared(dst + Tile::offset(row, col), load_unaligned_16(src_col + row * stride_row, num_valid));
    }
  }
}

/// As copy_tile_async, for rows that lie anywhere: row i begins at src + offset_of(i). All lanes of a warp ask for rows
/// of one aligned group of 8 at a time.
template <typename T, int ROWS, int COLS, int kNumThreads, typename RowOffset>
__device__ __forceinline__ void gather_tile_async(uint32_t dst, const T* src, const RowOffset& offset_of, int num_rows,
                                                  int num_cols, bool is_aligned, int thread_idx) {
  using Tile = SmemTile<T, COLS>;
  constexpr int kElements = 16 / sizeof(T);
  constexpr int kUnits = COLS / kElements, kRowStep = kNumThreads / kUnits;
  static_assert(kNumThreads % kUnits == 0 && ROWS % kRowStep == 0);
  static_assert(kUnits >= 4, "lanes of a warp are of 8 rows at most");
  const int col = thread_idx % kUnits * kElements;
#pragma unroll 4
  for (int i = 0; i < ROWS / kRowStep; ++i) {
    const int row = thread_idx / kUnits + i * kRowStep;
    const T* unit = src + offset_of(row) + col;
    const bool valid = row < num_rows && col < num_cols;
    if (is_aligned) {
      cp_async_16(dst + Tile::offset(row, col), valid ? unit : src, valid);
    } else {
      store_shared(dst + Tile::offset(row, col), load_unaligned_16(unit, valid ? num_cols - col : 0));
    }
  }
}

}  // namespace remora
