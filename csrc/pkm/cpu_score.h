// Scores of a block of query halves with all sub-keys of an axis, as keys in the order of common/cpu/select.h.
//
//   packed keys    [n / kPanel][ds][kPanel], zeros behind n
//   packed query   [tokens / kScoreRows][ds][kScoreRows], zeros behind the tokens
//   tile           [tokens][row_stride]
#pragma once
#include "common/cpu/panels.h"
#include "common/cpu/select.h"
#include "pkm/score.h"

namespace remora::REMORA_CPU_ISA {

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
    Vec<T> acc[kScoreRows][2];
    multiply_rows<T>(acc, packed_query + first * dims, packed_keys + panel * dims, dims);
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
