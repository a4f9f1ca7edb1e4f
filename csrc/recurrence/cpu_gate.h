// Gates of a chunk of tokens, one number per token and head, and the gradient of them.
#pragma once
#include <cstdint>

#include "common/cpu/simd.h"
#include "recurrence/cpu_sequence.h"

namespace remora::REMORA_CPU_ISA {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/// Gates below this act as a reset; -inf would turn differences of sums into NaN.
template <class T>
constexpr T kMinGate = sizeof(T) == 8 ? T(-700) : T(-88);

/// Decays within a chunk. G is the sum of the gates from the chunk's first token on, that token included. Only j <= i
/// of the matrix is ever read: what stands above may come from tokens that the row must not see.
template <class T, int kTokens>
struct ChunkDecay {
  alignas(64) T decay[kTokens * kTokens];  // e^(G_i - G_j)
  alignas(64) T from_start[kTokens];       // e^(G_i)
  alignas(64) T to_end[kTokens];           // e^(G_last - G_i)
  T total;                                 // e^(G_last)
};

/// `g` is the head's column of a [B, T, HV] tensor, or null.
template <class T, int kTokens>
inline void make_chunk_decay(ChunkDecay<T, kTokens>& chunk, const T* g, int64_t value_heads, const TokenRow* rows,
                             int64_t tokens) {
  constexpr int w = kWidth<T>;
  // Sums as gate + rest: next to a reset, the difference of two sums is far smaller than they are.
  alignas(64) T gate[kTokens], rest[kTokens];
  double sum = 0;
  for (int i = 0; i < kTokens; ++i) {
    if (g && i < tokens) {
      const T step = g[rows[i].row * value_heads];
      sum += step < kMinGate<T> ? kMinGate<T> : step;
    }
    gate[i] = static_cast<T>(sum);
    rest[i] = static_cast<T>(sum - gate[i]);
  }
  for (int j = 0; j < kTokens; j += w) {
    const Vec<T> column = load<T>(gate + j), column_rest = load<T>(rest + j);
    store<T>(chunk.from_start + j, exp_nonpositive(column));
    store<T>(chunk.to_end + j, exp_nonpositive((gate[kTokens - 1] - column) + (rest[kTokens - 1] - column_rest)));
    for (int i = 0; i < kTokens; ++i) {
      const Vec<T> difference = (gate[i] - column) + (rest[i] - column_rest);
      store<T>(chunk.decay + i * kTokens + j, exp_nonpositive(difference > T(0) ? Vec<T>{} : difference));
    }
  }
  chunk.total = chunk.from_start[kTokens - 1];
}

/// Sum of products of two states of n elements. It is one number for all gates of a chunk: errors of rounded operands
/// would not average out over the tokens.
template <class T>
REMORA_INLINE T state_product(const T* x, const T* y, int64_t n) {
  constexpr int w = kWidth<T>;
  Vec<T> dot[4] = {};
  for (int64_t i = 0; i < n; i += 4 * w) {
    unroll<4>([&](auto d) REMORA_ALWAYS_INLINE { dot[d] += load<T>(x + i + d * w) * load<T>(y + i + d * w); });
  }
  return sum<T>((dot[0] + dot[1]) + (dot[2] + dot[3]));
}

/// out[i] = sum of the lanes of row i.
template <int kTokens, class T>
REMORA_INLINE void sum_chunk_rows(T* out, const T* rows) {
  constexpr int w = kWidth<T>;
  for (int i = 0; i < kTokens; i += w) {
    Vec<T> block[w];
    unroll<w>([&](auto r) REMORA_ALWAYS_INLINE { block[r] = load<T>(rows + (i + r) * w); });
    store<T>(out + i, sum_rows(block));
  }
}

/// dg_t: pairs j < t <= i (null: none), reads of the chunk's first state at i >= t, writes at j < t into its last, and
/// the state that passes through. Every term carries exactly the decay it depends on, so nothing cancels.
template <int kTokens, class T>
REMORA_INLINE void gate_gradient(T* dg, int64_t value_heads, const TokenRow* rows, int64_t tokens, const T* pairs,
                                 const T* reads, const T* writes, T through) {
  T column[kTokens] = {};  // sum over i >= t of pairs[i][j]
  T before[kTokens];       // sum over j < t of writes
  T sum = through;
  for (int t = 0; t < kTokens; ++t) {
    before[t] = sum;
    sum += writes[t];
  }
  T after = 0;
  for (int t = kTokens - 1; t >= 0; --t) {
    after += reads[t];
    T rectangle = 0;
    for (int j = 0; pairs && j < t; ++j) {
      column[j] += pairs[t * kTokens + j];
      rectangle += column[j];
    }
    if (t < tokens) dg[rows[t].row * value_heads] = rectangle + after + before[t];
  }
}

}  // namespace remora::REMORA_CPU_ISA
