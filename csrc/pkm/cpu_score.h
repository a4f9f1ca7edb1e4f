// Scores of a block of query halves with all sub-keys of an axis, as keys in the order of cpu_select.h.
//
//   packed keys    [n / kPanel][ds][kPanel], zeros behind n
//   packed query   [tokens / kScoreRows][ds][kScoreRows], zeros behind the tokens
//   tile           [tokens][row_stride]: two vectors of keys for kScoreRows tokens stay in registers
#pragma once
#include "pkm/cpu_select.h"
#include "pkm/score.h"

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

/// Rows [0, num_rows), `row_stride` elements apart, as blocks [ds][kRows], zeros behind; squared norms of all.
template <int64_t kRows, class T, class E>
void pack_rows(const E* rows, int64_t row_stride, int64_t num_rows, int64_t dims, T* packed, T* squares) {
  for (int64_t first = 0; first < num_rows; first += kRows) {
    T* block = packed + first * dims;
    if (first + kRows > num_rows) std::fill(block, block + kRows * dims, T{0});
    for (int64_t i = 0; i < kRows; ++i) {
      const bool is_row = first + i < num_rows;
      squares[first + i] = is_row ? spread_row(rows + (first + i) * row_stride, dims, block + i, kRows) : T{0};
    }
  }
}

template <class T>
struct ScoreTile {
  int64_t num_keys, dims, row_stride;
  ScoreFunction function;
  const T* packed_keys;
  const T* key_squares;
  const T* packed_query;
  const T* query_squares;
  Key<T>* keys;  // [tokens][row_stride], kNoKey behind num_keys up to a whole panel

  // Not inlined: the products of the common dot score keep the registers.
  __attribute__((noinline)) Vec<T> score(Vec<T> product, Vec<T> key_square, T query_square) const {
    const T eps = static_cast<T>(function.eps);
    if (function.kind == ScoreFunction::Kind::kCosine) {
      const T scale = static_cast<T>(function.tau) / std::sqrt(query_square + eps);
      Vec<T> norm = key_square + eps;
      for (int i = 0; i < kWidth<T>; ++i) norm[i] = std::sqrt(norm[i]);
      return product * scale / norm;
    }
    const Vec<T> distance = query_square + key_square - T{2} * product;
    return -log_positive(eps + ((distance < T{0}) ? Vec<T>{} : distance));
  }

  /// Tokens [first, first + kScoreRows) with the panel of keys at `panel`.
  void multiply(int64_t first, int64_t panel) const {
    constexpr int w = kWidth<T>;
    Vec<T> acc[kScoreRows][2] = {};
    const T* x = packed_query + first * dims;
    const T* y = packed_keys + panel * dims;
    for (int64_t d = 0; d < dims; ++d, x += kScoreRows, y += kPanel<T>) {
      const Vec<T> y0 = load<T>(y), y1 = load<T>(y + w);
      unroll<kScoreRows>([&](auto i) REMORA_ALWAYS_INLINE { acc[i][0] += x[i] * y0, acc[i][1] += x[i] * y1; });
    }
    const bool is_dot = function.kind == ScoreFunction::Kind::kDot;
    unroll<kScoreRows>([&](auto i) REMORA_ALWAYS_INLINE {
      unroll<2>([&](auto half) REMORA_ALWAYS_INLINE {
        Vec<T> s = acc[i][half];
        if (!is_dot) s = score(s, load<T>(key_squares + panel + half * w), query_squares[first + i]);
        store<Key<T>>(keys + (first + i) * row_stride + panel + half * w, keys_of<T>(s));
      });
    });
  }

  void fill(int64_t tokens) const {
    for (int64_t panel = 0; panel < num_keys; panel += kPanel<T>) {
      for (int64_t first = 0; first < tokens; first += kScoreRows) multiply(first, panel);
    }
    for (int64_t row = 0; row < tokens; ++row) {
      for (int64_t i = num_keys; i < pad_to_panel<T>(num_keys); ++i) keys[row * row_stride + i] = kNoKey<T>;
    }
  }
};

}  // namespace remora::REMORA_CPU_ISA
