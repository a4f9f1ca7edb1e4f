// A walk over chunks of 16 tokens: a linear recurrence with scalar decay, read at every token. walk_kernel.cuh has its
// formulas; the operator is four such walks.
//
// The state Z of a walk is cut into panels of two vectors of x channels, [channels of w and r][2 width], which stay in
// L1 over the chunks of an interval. Rows of tokens are [tokens][channels] in T, zero-padded: products broadcast their
// elements and need no transposed copies.
#pragma once
#include <cstdint>

#include "common/cpu/arena.h"
#include "recurrence/cpu_gate.h"
#include "recurrence/simple_gla/cpu.h"

namespace remora::REMORA_CPU_ISA::simple_gla {

constexpr int kTokens = 16;  // of a chunk
constexpr int64_t kChunks = kStateInterval / kTokens;

/// Rows whose products with two vectors fill half of the registers.
constexpr int kTile = kNumRegisters / 4;

template <class T>
constexpr int64_t kPanel = 2 * kWidth<T>;

template <class T>
using Gates = ChunkDecay<T, kTokens>;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// Rows of a panel; a multiple of kTile, of every vector width, and four vectors of a panel's elements.
constexpr int64_t panel_rows(int64_t dims) { return round_up(dims, 16); }

/// Columns of token rows: whole units. Between the rows lies half a line, which keeps the same columns of a chunk's
/// tokens from meeting in one set of the cache.
constexpr int64_t padded_columns(int64_t dims) { return round_up(dims, kSimpleGlaUnit); }
constexpr int64_t row_stride(int64_t dims) { return padded_columns(dims) + 8; }

template <class T>
struct Rows {
  const T* data;
  int64_t stride;

  REMORA_INLINE const T* operator[](int64_t i) const { return data + i * stride; }
  REMORA_INLINE Rows from(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

/// A head of a [B, T, heads, channels] tensor, from one of its channels on.
template <class E>
struct HeadTensor {
  const E* data;
  TokenStrides stride;
  int64_t channels;

  HeadTensor(const void* tensor, const TokenStrides& strides, int64_t head, int64_t first, int64_t num_channels)
      : data(static_cast<const E*>(tensor) + head * strides.head + first), stride(strides), channels(num_channels) {}
};

/// Rows of the tokens of an interval, zeros behind the channels and up to a whole chunk.
template <class T, class E>
inline Rows<T> load_rows(T* rows, const HeadTensor<E>& tensor, const TokenRow* tokens, int64_t num_tokens) {
  constexpr int w = kWidth<T>;
  const int64_t stride = row_stride(tensor.channels), columns = padded_columns(tensor.channels);
  for (int64_t i = 0; i < round_up(num_tokens, kTokens); ++i) {
    const E* source = tensor.data + tokens[min(i, num_tokens - 1)].offset(tensor.stride);
    const int64_t valid = i < num_tokens ? tensor.channels : 0;
    T* row = rows + i * stride;
    int64_t d = 0;
    for (; d + w <= valid; d += w) store<T>(row + d, load<T>(source + d));
    if (d < valid) store<T>(row + d, load_first<T>(source + d, valid - d)), d += w;
    for (; d < columns; d += w) store<T>(row + d, Vec<T>{});
  }
  return {rows, stride};
}

/// Asks for a share of the rows that the next interval loads.
template <class E>
inline void prefetch_rows(const HeadTensor<E>& tensor, const RecurrenceShape& shape, const RecurrenceSequence& sequence,
                          int64_t begin, int64_t end) {
  for (int64_t t = max(begin, 0); t < min(end, sequence.length); ++t) {
    prefetch_row(tensor.data + sequence.at(shape, t).offset(tensor.stride), tensor.channels);
  }
}

/// Copies a panel of a matrix whose element (d, x) lies at d * stride_d + x * stride_x, one of which is 1; zeros where
/// the matrix ends, or everywhere if there is none.
template <class T, class E>
inline void load_panel(T* panel, const E* matrix, int64_t dims, int64_t lanes, int64_t stride_d, int64_t stride_x) {
  constexpr int w = kWidth<T>;
  const int64_t rows = panel_rows(dims);
  for (int64_t v = 0; v < 2; ++v) {
    T* out = panel + v * w;
    const E* source = matrix + v * w * stride_x;
    const int64_t valid = matrix ? max(0, min(lanes - v * w, w)) : 0;
    if (stride_x == 1) {
      for (int64_t d = 0; d < rows; ++d) {
        Vec<T> row{};
        if (d < dims && valid > 0) {
          row = valid == w ? load<T>(source + d * stride_d) : load_first<T>(source + d * stride_d, valid);
        }
        store<T>(out + d * kPanel<T>, row);
      }
      continue;
    }
    for (int64_t d = 0; d < rows; d += w) {
      Vec<T> block[w];
      for (int64_t x = 0; x < w; ++x) {
        const E* column = source + x * stride_x + d;
        const int64_t left = x < valid ? min(dims - d, w) : 0;
        block[x] = left == w ? load<T>(column) : left > 0 ? load_first<T>(column, left) : Vec<T>{};
      }
      transpose(block);
      for (int64_t x = 0; x < w; ++x) store<T>(out + (d + x) * kPanel<T>, block[x]);
    }
  }
}

template <class T, class E>
inline void store_panel(const T* panel, E* matrix, int64_t dims, int64_t lanes, int64_t stride_d, int64_t stride_x) {
  constexpr int w = kWidth<T>;
  for (int64_t v = 0; v < 2; ++v) {
    const T* source = panel + v * w;
    E* out = matrix + v * w * stride_x;
    const int64_t valid = max(0, min(lanes - v * w, w));
    if (stride_x == 1) {
      for (int64_t d = 0; valid > 0 && d < dims; ++d) {
        const Vec<T> row = load<T>(source + d * kPanel<T>);
        if (valid == w) {
          store<T>(out + d * stride_d, row);
        } else {
          store_first<T>(out + d * stride_d, row, valid);
        }
      }
      continue;
    }
    for (int64_t d = 0; valid > 0 && d < dims; d += w) {
      Vec<T> block[w];
      for (int64_t x = 0; x < w; ++x) block[x] = load<T>(source + (d + x) * kPanel<T>);
      transpose(block);
      for (int64_t x = 0; x < valid; ++x) {
        if (dims - d >= w) {
          store<T>(out + x * stride_x + d, block[x]);
        } else {
          store_first<T>(out + x * stride_x + d, block[x], dims - d);
        }
      }
    }
  }
}

/// acc[i] = sum over d of rows[i][d] * panel[d].
template <class T>
REMORA_INLINE void multiply_panel(Vec<T> (&acc)[kTile][2], const Rows<T>& rows, const T* panel, int64_t dims) {
  constexpr int w = kWidth<T>;
  unroll<kTile>([&](auto i) REMORA_ALWAYS_INLINE { acc[i][0] = acc[i][1] = Vec<T>{}; });
  for (int64_t d = 0; d < dims; ++d) {
    const Vec<T> first = load<T>(panel + d * kPanel<T>), second = load<T>(panel + d * kPanel<T> + w);
    unroll<kTile>([&](auto i) REMORA_ALWAYS_INLINE {
      const T row = rows.data[i * rows.stride + d];
      acc[i][0] += first * row;
      acc[i][1] += second * row;
    });
  }
}

/// out = decay * in + sum over the tokens of w_j x_j^T; x is [tokens][2 width].
template <class T>
REMORA_INLINE void update_panel(T* out, const T* in, int64_t dims, T decay, const Rows<T>& rows, const T* x,
                                int64_t tokens) {
  constexpr int w = kWidth<T>;
  for (int64_t d = 0; d < dims; d += kTile) {
    Vec<T> acc[kTile][2] = {};
    const T* row = rows.data + d;
    for (int64_t j = 0; j < tokens; ++j) {
      const Vec<T> first = load<T>(x + j * kPanel<T>), second = load<T>(x + j * kPanel<T> + w);
      unroll<kTile>([&](auto i) REMORA_ALWAYS_INLINE {
        acc[i][0] += first * row[i];
        acc[i][1] += second * row[i];
      });
      row += rows.stride;
    }
    unroll<kTile>([&](auto i) REMORA_ALWAYS_INLINE {
      unroll<2>([&](auto v) REMORA_ALWAYS_INLINE {
        const int64_t at = (d + i) * kPanel<T> + v * w;
        store<T>(out + at, load<T>(in + at) * decay + acc[i][v]);
      });
    });
  }
}

/// out[i][j] = later_i . earlier_j of the tokens of a chunk, in blocks on and below the diagonal.
template <class T>
inline void multiply_tokens(T* out, const Rows<T>& later, const Rows<T>& earlier, int64_t dims, int64_t tokens) {
  constexpr int w = kWidth<T>, rows = 4, columns = w > 8 ? w / rows : 2, products = rows * columns;
  for (int64_t i = 0; i < tokens; i += rows) {
    for (int64_t j = 0; j < i + rows; j += columns) {
      Vec<T> acc[products] = {};
      for (int64_t d = 0; d < dims; d += w) {
        Vec<T> y[columns];
        unroll<columns>([&](auto c) REMORA_ALWAYS_INLINE { y[c] = load<T>(earlier[j + c] + d); });
        unroll<rows>([&](auto r) REMORA_ALWAYS_INLINE {
          const Vec<T> x = load<T>(later[i + r] + d);
          unroll<columns>([&](auto c) REMORA_ALWAYS_INLINE { acc[r * columns + c] += x * y[c]; });
        });
      }
      T sums[products];
      for (int p = 0; p < products; p += w) store<T>(sums + p, sum_rows(acc + p));
      for (int p = 0; p < products; ++p) out[(i + p / columns) * kTokens + j + p % columns] = sums[p];
    }
  }
}

/// P_ij = scale D_ij (later_i . earlier_j); only j <= i is meant to be read.
template <class T>
inline void make_pairs(T* pairs, const Gates<T>& gates, const Rows<T>& later, const Rows<T>& earlier, int64_t dims,
                       int64_t tokens, T scale) {
  constexpr int w = kWidth<T>;
  for (int at = 0; at < kTokens * kTokens; at += w) store<T>(pairs + at, Vec<T>{});
  multiply_tokens(pairs, later, earlier, dims, tokens);
  for (int at = 0; at < kTokens * kTokens; at += w) {
    store<T>(pairs + at, load<T>(pairs + at) * load<T>(gates.decay + at) * scale);
  }
}

/// What a chunk does to one panel of the state.
///   out(i, acc)    takes the outputs of token i, two vectors
///   inner(i, acc)  sees their part that comes from the state
/// `x` begins at the panel's columns. The state that leaves the chunk goes to `next`, if that is not null.
template <bool kReverse, class T, class Out, class Inner>
REMORA_INLINE void walk_chunk(T* next, const T* panel, int64_t dims, const Rows<T>& write, const Rows<T>& read,
                              const Rows<T>& x, const Gates<T>& gates, const T* pairs, T scale, int64_t tokens,
                              const Inner& inner, const Out& out) {
  constexpr int w = kWidth<T>;
  const int64_t padded_tokens = round_up(tokens, kTile);
  for (int64_t t = 0; t < padded_tokens; t += kTile) {
    Vec<T> acc[kTile][2];
    multiply_panel(acc, read.from(t, 0), panel, dims);
    unroll<kTile>([&](auto i) REMORA_ALWAYS_INLINE {
      const T factor = kReverse ? gates.to_end[t + i] : scale * gates.from_start[t + i];
      acc[i][0] *= factor;
      acc[i][1] *= factor;
      inner(t + i, acc[i]);
    });
    const auto add = [&](int64_t source, auto first, auto last) REMORA_ALWAYS_INLINE {
      const Vec<T> x0 = load<T>(x[source]), x1 = load<T>(x[source] + w);
      unroll<last - first + 1>([&](auto n) REMORA_ALWAYS_INLINE {
        constexpr int i = first + n;
        const T pair = kReverse ? pairs[source * kTokens + t + i] : pairs[(t + i) * kTokens + source];
        acc[i][0] += x0 * pair;
        acc[i][1] += x1 * pair;
      });
    };
    constexpr std::integral_constant<int, 0> top{};
    constexpr std::integral_constant<int, kTile - 1> bottom{};
    for (int64_t j = 0; !kReverse && j < t; ++j) add(j, top, bottom);
    unroll<kTile>([&](auto n) REMORA_ALWAYS_INLINE {
      if constexpr (kReverse) {
        add(t + n, top, n);
      } else {
        add(t + n, n, bottom);
      }
    });
    for (int64_t j = t + kTile; kReverse && j < padded_tokens; ++j) add(j, top, bottom);
    unroll<kTile>([&](auto i) REMORA_ALWAYS_INLINE { out(t + i, acc[i]); });
  }
  if (!next) return;
  alignas(64) T scaled[kTokens * kPanel<T>];
  for (int64_t j = 0; j < padded_tokens; ++j) {
    const T factor = kReverse ? scale * gates.from_start[j] : gates.to_end[j];
    store<T>(scaled + j * kPanel<T>, load<T>(x[j]) * factor);
    store<T>(scaled + j * kPanel<T> + w, load<T>(x[j] + w) * factor);
  }
  update_panel(next, panel, panel_rows(dims), gates.total, write, scaled, padded_tokens);
}

/// Writes the first `lanes` of two vectors.
template <class T, class E>
REMORA_INLINE void store_lanes(E* out, const Vec<T> (&acc)[2], int64_t lanes) {
  constexpr int w = kWidth<T>;
  if (lanes >= kPanel<T>) {
    store<T>(out, acc[0]);
    store<T>(out + w, acc[1]);
    return;
  }
  store_first<T>(out, acc[0], min(lanes, w));
  if (lanes > w) store_first<T>(out + w, acc[1], lanes - w);
}

}  // namespace remora::REMORA_CPU_ISA::simple_gla
