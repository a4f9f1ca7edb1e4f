// Blocks of rows and of keys, brought into the layouts of the micro-kernels.
//
// Scores of a chunk of keys and a chunk of rows are kept with the rows along the lanes, [key][row]: what a softmax does
// is then vertical, and the same buffer is the operand that the product with the values broadcasts from.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/cpu/arena.h"
#include "common/cpu/functions.h"
#include "common/cpu/microkernel.h"
#include "segment/prefix_attention/cpu.h"

namespace remora::REMORA_CPU_ISA {

constexpr int64_t kBlockRows = kCpuBlockRows, kBlockKeys = kCpuBlockKeys;
constexpr int64_t kRowChunks = kBlockRows / kChunk, kKeyChunks = kBlockKeys / kChunk;
constexpr int64_t kChunkScores = kChunk * kChunk;
static_assert(kBlockRows % kChunk == 0 && kBlockKeys % kChunk == 0);

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

/// Integers as wide as T, so that comparisons of them select lanes of T.
template <class T>
using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

/// 2^x for x <= 0 or NaN.
template <class T>
REMORA_INLINE Vec<T> exp2_or_nan(Vec<T> x) {
  return (x == x) ? exp2(x) : x;
}

template <class T, class E>
REMORA_INLINE T dot_rows(const E* x, const E* y, int64_t dims) {
  Vec<T> acc{};
  for (int64_t d = 0; d < dims; d += kWidth<T>) acc += load_lanes<T>(x, d, dims) * load_lanes<T>(y, d, dims);
  return sum<T>(acc);
}

/// Rows of one key head of a sequence. Behind the last stand copies of it that see nothing: all can be read.
struct RowBlock {
  AttentionSpan tokens;
  int64_t seq_idx, kv_head, group, first, count;
  int64_t token[kBlockRows];  // within the sequence
  int64_t head[kBlockRows];   // of the queries

  RowBlock(const PrefixAttentionInputs& in, int64_t seq, int64_t kv_head_idx, int64_t block)
      : tokens(in.tokens(seq)), seq_idx(seq), kv_head(kv_head_idx), group(in.shape.group()) {
    first = block * kBlockRows;
    count = std::clamp<int64_t>(tokens.length * group - first, 0, kBlockRows);
    for (int64_t i = 0; i < kBlockRows && count > 0; ++i) {
      const int64_t row = first + std::min(i, count - 1);
      token[i] = row / group, head[i] = kv_head * group + row % group;
    }
  }

  int64_t chunks() const { return (count + kChunk - 1) / kChunk; }
  /// The token of a row among the [B * T].
  int64_t place(const AttentionShape& shape, int64_t i) const {
    return tokens.batch * shape.seqlen + tokens.begin + token[i];
  }
  template <class E>
  Tile<E> tile(const void* data, const AttentionStrides& stride, int64_t first_row) const {
    Tile<E> rows;
    for (int64_t i = 0; i < kChunk; ++i) {
      const int64_t at = first_row + i;
      rows.row[i] = static_cast<const E*>(data) + stride.offset(tokens.batch, tokens.begin + token[at], head[at]);
    }
    return rows;
  }
};

/// What the rows of a block see of a source.
template <class T>
struct VisibleKeys {
  alignas(64) Index<T> begin[kBlockRows], end[kBlockRows];
  struct Chunk {
    int64_t begin, end;          // of keys that any row sees
    int64_t all_begin, all_end;  // of keys that all rows see
  } chunk[kRowChunks];
  int64_t lowest, highest;  // of the block

  VisibleKeys(const PrefixAttentionInputs& in, const AttentionKeys& source, const AttentionSpan& keys,
              const RowBlock& rows) {
    lowest = keys.length, highest = 0;
    for (int64_t c = 0; c < kRowChunks; ++c) {
      chunk[c] = {keys.length, 0, 0, keys.length};
      for (int64_t i = c * kChunk; i < (c + 1) * kChunk; ++i) {
        const KeyRange range =
            i < rows.count ? source.visible(keys, rows.token[i], rows.place(in.shape, i)) : KeyRange{};
        begin[i] = range.begin, end[i] = range.end;
        chunk[c].all_begin = std::max<int64_t>(chunk[c].all_begin, range.begin);
        chunk[c].all_end = std::min<int64_t>(chunk[c].all_end, range.end);
        if (range.begin >= range.end) continue;
        chunk[c].begin = std::min<int64_t>(chunk[c].begin, range.begin);
        chunk[c].end = std::max<int64_t>(chunk[c].end, range.end);
      }
      if (chunk[c].begin >= chunk[c].end) continue;
      lowest = std::min(lowest, chunk[c].begin), highest = std::max(highest, chunk[c].end);
    }
  }

  /// The chunks of the keys from `first_key` on of which row chunk c sees any: [first, last).
  struct Chunks {
    int64_t first, last;
  };
  Chunks chunks(int64_t c, int64_t first_key) const {
    const int64_t from = std::max(chunk[c].begin, first_key) - first_key;
    const int64_t to = std::min(chunk[c].end, first_key + kBlockKeys) - first_key;
    return from < to ? Chunks{from / kChunk, (to + kChunk - 1) / kChunk} : Chunks{0, 0};
  }
  bool all_see(int64_t c, int64_t first_key) const {
    return chunk[c].all_begin <= first_key && first_key + kChunk <= chunk[c].all_end;
  }
};

/// Rows as a panel of products over them, [kBlock / kPack][pad(dims)] words; what is not finite becomes zero. Returns
/// whether everything was. row(i) is the address of row i.
template <class Op, class E, class Row>
inline bool load_rows(typename Op::Word* panel, const Row& row, int64_t block, int64_t dims) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>;
  Vec<T> rest{};  // of finite numbers, x - x is zero
  const auto finite = [&](const E* p, int64_t d) REMORA_ALWAYS_INLINE {
    const Vec<T> x = d < dims ? load_lanes<T>(p, d, dims) : Vec<T>{}, difference = x - x;
    rest += difference;
    return (difference == T(0)) ? x : Vec<T>{};
  };
  for (int64_t i = 0; i < block; i += Op::kPack) {
    const E* const even = row(i);
    const E* const odd = row(i + Op::kPack - 1);
    for (int64_t d = 0; d < pad(dims); d += w) {
      typename Op::Word* const to = panel + i / Op::kPack * pad(dims) + d;
      if constexpr (Op::kPack == 1) {
        store<T>(to, finite(even, d));
      } else {
        store<typename Op::Word>(to, Op::pack(finite(even, d), finite(odd, d)));
      }
    }
  }
  return sum<T>(rest) == T(0);
}

/// to += weight * (what load_rows took away from the row). A weight of zero says that the row was not seen.
template <class T, class E>
inline void add_not_finite(T* to, T weight, const E* row, int64_t dims) {
  if (weight == T(0)) return;
  for (int64_t d = 0; d < dims; ++d) {
    const T x = load_one<T>(row + d);
    if (x - x != T(0)) to[d] += weight * x;
  }
}

/// [n / kPack] rows of kChunk words out of n rows of kChunk numbers: what a product over n broadcasts from.
template <class Op>
REMORA_INLINE const typename Op::Word* as_operand(const typename Op::Real* rows, int64_t n, typename Op::Word* packed) {
  if constexpr (Op::kPack == 1) {
    return rows;
  } else {
    constexpr int w = kWidth<typename Op::Real>;
    for (int64_t i = 0; i < n; i += 2) {
      for (int j = 0; j < kChunk; j += w) {
        const auto even = load<typename Op::Real>(rows + i * kChunk + j);
        const auto odd = load<typename Op::Real>(rows + (i + 1) * kChunk + j);
        store<typename Op::Word>(packed + i / 2 * kChunk + j, Op::pack(even, odd));
      }
    }
    return packed;
  }
}

/// sums [kChunk][pad(dims)] = factor[i] * sums + the product of an operand of n rows with a panel.
template <class Op>
REMORA_INLINE void add_product(typename Op::Real* sums, const typename Op::Real* factor,
                               const typename Op::Word* operand, const typename Op::Word* panel, int64_t n,
                               int64_t padded) {
  using T = typename Op::Real;
  for (int64_t d = 0; d < padded; d += kWidth<T>) {
    Vec<T> acc[kChunk];
    unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { acc[i] = load<T>(sums + i * padded + d); });
    if (factor) unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { acc[i] *= factor[i]; });
    multiply_add<Op>(acc, operand, panel + d, padded, n / Op::kPack);
    unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { store<T>(sums + i * padded + d, acc[i]); });
  }
}

/// Where the keys of a block lie. Behind the last stand copies of it.
template <class E>
struct KeyRows {
  const E* data;
  int64_t stride, last;

  KeyRows(const void* base, const AttentionStrides& strides, const AttentionSpan& keys, int64_t kv_head, int64_t first,
          int64_t count)
      : data(static_cast<const E*>(base) + strides.offset(keys.batch, keys.begin + first, kv_head)),
        stride(strides.token),
        last(count - 1) {}
  REMORA_INLINE const E* operator()(int64_t i) const { return data + std::min(i, last) * stride; }
  REMORA_INLINE Tile<E> tile(int64_t first) const {
    Tile<E> rows;
    for (int64_t i = 0; i < kChunk; ++i) rows.row[i] = (*this)(first + i);
    return rows;
  }
};

/// Scores of a chunk of keys for a chunk of rows, times log2(e); those that a row does not see stay.
template <class T>
struct ScoreMap {
  T scale;              // of q . k, times log2(e)
  const T* bias;        // of head 0 and key 0 of the block, or null
  int64_t stride;       // between heads
  const int64_t* head;  // of the rows of the chunk, or null: all the same, `bias` points at it

  ScoreMap(const PrefixAttentionInputs& in, const AttentionKeys& source, const AttentionSpan& keys,
           const RowBlock& rows, int64_t first_row, int64_t first_key)
      : scale(static_cast<T>(in.scale * kLog2e)),
        bias(static_cast<const T*>(source.bias)),
        stride(source.bias_head),
        head(rows.head + first_row) {
    if (bias) bias += keys.batch * source.bias_batch + keys.begin + first_key;
    if (bias && rows.group == 1) bias += head[0] * stride, head = nullptr;
  }

  /// Lanes j ... of the scores of key `key`.
  REMORA_INLINE Vec<T> operator()(Vec<T> dot, int64_t key, int j) const {
    const Vec<T> x = dot * scale;
    if (!bias) return x;
    if (!head) return x + bias[key] * T(kLog2e);
    Vec<T> b;
    for (int i = 0; i < kWidth<T>; ++i) b[i] = bias[head[j + i] * stride + key];
    return x + b * T(kLog2e);
  }
};

}  // namespace remora::REMORA_CPU_ISA
