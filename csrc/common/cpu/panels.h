// Rows packed for products of all of them with all of another matrix: kScoreRows broadcast rows by kPanel columns stay
// in registers.
#pragma once
#include <algorithm>

#include "common/cpu/simd.h"

namespace remora::REMORA_CPU_ISA {

constexpr int kScoreRows = kNumRegisters == 32 ? 12 : 6;

template <class T>
constexpr int64_t kPanel = 2 * kWidth<T>;

template <class T>
constexpr int64_t pad_to_panel(int64_t n) {
  return (n + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

/// Elements of a row to places `stride` apart, and the squared norm of the row.
template <class T, class E>
REMORA_INLINE T spread_row(const E* row, int64_t dims, T* to, int64_t stride) {
  constexpr int64_t w = kWidth<T>;
  Vec<T> squares{};
  for (int64_t d = 0; d < dims; d += w) {
    const Vec<T> x = d + w <= dims ? load<T>(row + d) : load_first<T>(row + d, dims - d);
    squares += x * x;
    T lanes[w];
    store<T>(lanes, x);
    for (int64_t lane = 0; lane < std::min(w, dims - d); ++lane) to[(d + lane) * stride] = lanes[lane];
  }
  return sum<T>(squares);
}

/// kWidth rows, `row_stride` elements apart, of which num_rows exist, to columns of vectors `stride` apart; their
/// squared norms, a lane each.
template <class T, class E>
REMORA_INLINE Vec<T> spread_rows(const E* rows, int64_t row_stride, int64_t num_rows, int64_t dims, T* to,
                                 int64_t stride) {
  constexpr int w = kWidth<T>;
  Vec<T> squares{};
  for (int64_t d = 0; d < dims; d += w) {
    Vec<T> x[w];
    unroll<w>([&](auto i) REMORA_ALWAYS_INLINE {
      const E* row = rows + i * row_stride + d;
      x[i] = i >= num_rows ? Vec<T>{} : d + w <= dims ? load<T>(row) : load_first<T>(row, dims - d);
    });
    transpose(x);
    unroll<w>([&](auto lane) REMORA_ALWAYS_INLINE {
      if (d + lane >= dims) return;
      store<T>(to + (d + lane) * stride, x[lane]);
      squares += x[lane] * x[lane];
    });
  }
  return squares;
}

/// Rows [0, num_rows), `row_stride` elements apart, as blocks [ds][kRows], zeros behind; squared norms of all.
template <int64_t kRows, class T, class E>
void pack_rows(const E* rows, int64_t row_stride, int64_t num_rows, int64_t dims, T* packed, T* squares) {
  for (int64_t first = 0; first < num_rows; first += kRows) {
    T* block = packed + first * dims;
    if constexpr (kRows % kWidth<T> == 0) {
      for (int64_t i = 0; i < kRows; i += kWidth<T>) {
        const E* from = rows + (first + i) * row_stride;
        store<T>(squares + first + i, spread_rows(from, row_stride, num_rows - first - i, dims, block + i, kRows));
      }
    } else {
      if (first + kRows > num_rows) std::fill(block, block + kRows * dims, T{0});
      for (int64_t i = 0; i < kRows; ++i) {
        const bool is_row = first + i < num_rows;
        squares[first + i] = is_row ? spread_row(rows + (first + i) * row_stride, dims, block + i, kRows) : T{0};
      }
    }
  }
}

/// acc[i] = products of the kScoreRows rows at `rows` with the panel of columns at `panel`, both packed.
template <class T>
REMORA_INLINE void multiply_rows(Vec<T> (&acc)[kScoreRows][2], const T* rows, const T* panel, int64_t dims) {
  constexpr int w = kWidth<T>;
  unroll<kScoreRows>([&](auto i) REMORA_ALWAYS_INLINE { acc[i][0] = acc[i][1] = Vec<T>{}; });
  for (int64_t d = 0; d < dims; ++d, rows += kScoreRows, panel += kPanel<T>) {
    const Vec<T> y0 = load<T>(panel), y1 = load<T>(panel + w);
    unroll<kScoreRows>([&](auto i) REMORA_ALWAYS_INLINE { acc[i][0] += rows[i] * y0, acc[i][1] += rows[i] * y1; });
  }
}

}  // namespace remora::REMORA_CPU_ISA
