// Register-blocked products of a chunk of tokens with panels one vector wide.
//
//   operand  [n / kPack][kChunk] words: feature-major tokens, broadcast one word at a time
//   panel    [n / kPack][width] words: one vector per feature
//
// A word is one element, or with bf16 dot instructions the two neighbours along the summed dimension. The sixteen
// accumulators (eight where there are 16 registers) and the vector they share never leave the register file; every
// multiplication reads its broadcast operand from L1.
#pragma once
#include "common/cpu/simd.h"

namespace remora::REMORA_CPU_ISA {

/// Tokens of a chunk: as many as leave half of the registers for everything else.
constexpr int kChunk = kNumRegisters / 2;

/// Dimensions are zero-padded to this; a multiple of the chunk, of every vector width and of two.
constexpr int64_t kPadding = 16;
constexpr int64_t pad(int64_t dim) { return (dim + kPadding - 1) / kPadding * kPadding; }

/// Products in T.
template <class T>
struct Multiply {
  using Real = T;
  using Word = T;
  using Row = T;  // element of a matrix about to become an operand
  static constexpr int kPack = 1;

  static REMORA_INLINE void accumulate(Vec<T>& acc, const Word& x, Vec<Word> y) { acc += x * y; }
  static REMORA_INLINE void accumulate(Vec<T>& acc, Vec<Word> x, Vec<Word> y) { acc += x * y; }
};

#if defined(__AVX512BF16__)
/// The permutation whose lane i reads 16-bit lane f(i).
template <class F>
REMORA_INLINE __m512i lane_index(F f) {
  return [&]<int... I>(std::integer_sequence<int, I...>) REMORA_ALWAYS_INLINE {
    return reinterpret_cast<__m512i>(typename VectorOf<uint16_t, 32>::Type{static_cast<uint16_t>(f(I))...});
  }(std::make_integer_sequence<int, 32>{});
}

/// Products of bf16 pairs, accumulated in fp32.
struct DotBFloat16 {
  using Real = float;
  using Word = uint32_t;
  using Row = BFloat16;
  static constexpr int kPack = 2;

  // The compiler splits the broadcast from the dot, which costs a quarter of the throughput.
  static REMORA_INLINE void accumulate(Vec<float>& acc, const Word& x, Vec<Word> y) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(y), "m"(x));
  }
  static REMORA_INLINE void accumulate(Vec<float>& acc, Vec<Word> x, Vec<Word> y) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(y), "v"(x));
  }
  /// Word i holds even[i] below odd[i].
  static REMORA_INLINE Vec<Word> pack(Vec<float> even, Vec<float> odd) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    return reinterpret_cast<Vec<Word>>(
        _mm512_permutexvar_epi16(lane_index([](int i) { return i / 2 + i % 2 * 16; }), halves));
  }
  /// What pack rounded away.
  static REMORA_INLINE Vec<Word> pack_rest(Vec<float> even, Vec<float> odd, Vec<Word> packed) {
    return pack(even - reinterpret_cast<Vec<float>>(packed << 16),
                odd - reinterpret_cast<Vec<float>>(packed & 0xffff0000u));
  }
  /// Word i < 8 holds elements 2i and 2i + 1 of `first`, the others those of `second`.
  static REMORA_INLINE Vec<Word> pack_neighbours(Vec<float> first, Vec<float> second) {
    return reinterpret_cast<Vec<Word>>(_mm512_cvtne2ps_pbh(second, first));
  }
};
#endif

/// Words per token along a padded dimension.
template <class Op>
constexpr int64_t words(int64_t padded) {
  return padded / Op::kPack;
}

/// acc[i] += sum over n words of operand[.][i] * panel[.].
template <class Op>
REMORA_INLINE void multiply_add(Vec<typename Op::Real> (&acc)[kChunk], const typename Op::Word* operand,
                                const typename Op::Word* panel, int64_t panel_stride, int64_t n) {
  using Word = typename Op::Word;
  for (int64_t k = 0; k < n; ++k) {
    const Vec<Word> y = load<Word>(panel + k * panel_stride);
    const Word* x = operand + k * kChunk;
    unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { Op::accumulate(acc[i], x[i], y); });
  }
}

/// acc[i] = the same.
template <class Op>
REMORA_INLINE void multiply(Vec<typename Op::Real> (&acc)[kChunk], const typename Op::Word* operand,
                            const typename Op::Word* panel, int64_t panel_stride, int64_t n) {
  unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { acc[i] = Vec<typename Op::Real>{}; });
  multiply_add<Op>(acc, operand, panel, panel_stride, n);
}

/// Panels that a product takes side by side. Where 16 registers hold half of the accumulators and a broadcast is an
/// instruction of its own, a broadcast word has to serve two vectors, or loads are what limits.
template <class Op>
constexpr int kPanelsAbreast = kNumRegisters == 16 && Op::kPack == 1 ? 2 : 1;

/// out [kPanels][kChunk][width] = the sums of multiply for panels `distance` apart.
template <class Op, int kPanels>
REMORA_INLINE void multiply_abreast(typename Op::Real* out, const typename Op::Word* operand,
                                    const typename Op::Word* panel, int64_t distance, int64_t n) {
  using T = typename Op::Real;
  using Word = typename Op::Word;
  constexpr int w = kWidth<T>, rows = kChunk / kPanels;
  for (int first = 0; first < kChunk; first += rows) {
    Vec<T> acc[kPanels][rows] = {};
    for (int64_t k = 0; k < n; ++k) {
      const Word* x = operand + k * kChunk + first;
      Vec<Word> y[kPanels];
      unroll<kPanels>([&](auto p) REMORA_ALWAYS_INLINE { y[p] = load<Word>(panel + p * distance + k * w); });
      unroll<rows>([&](auto i) REMORA_ALWAYS_INLINE {
        unroll<kPanels>([&](auto p) REMORA_ALWAYS_INLINE { Op::accumulate(acc[p][i], x[i], y[p]); });
      });
    }
    unroll<kPanels>([&](auto p) REMORA_ALWAYS_INLINE {
      unroll<rows>([&](auto i) REMORA_ALWAYS_INLINE { store<T>(out + (p * kChunk + first + i) * w, acc[p][i]); });
    });
  }
}

/// Matrix [kChunk][kChunk] of products of the tokens of two operands.
template <class Op>
REMORA_INLINE void multiply_tokens(typename Op::Real* out, const typename Op::Word* rows,
                                   const typename Op::Word* columns, int64_t n) {
  using T = typename Op::Real;
  for (int j = 0; j < kChunk; j += kWidth<T>) {
    Vec<T> acc[kChunk];
    multiply<Op>(acc, rows, columns + j, kChunk, n);
    unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE { store<T>(out + i * kChunk + j, acc[i]); });
  }
}

/// Where the rows of a chunk of tokens lie.
template <class E>
struct Tile {
  const E* row[kChunk];

  REMORA_INLINE Tile columns_from(int64_t column) const {
    Tile tile;
    for (int i = 0; i < kChunk; ++i) tile.row[i] = row[i] + column;
    return tile;
  }
};

template <class E>
REMORA_INLINE Tile<E> strided_tile(const E* data, int64_t stride) {
  Tile<E> tile;
  for (int i = 0; i < kChunk; ++i) tile.row[i] = data + i * stride;
  return tile;
}

/// The rows themselves, or where the tensor ends before the tile does, a zero-filled copy, so that the kernels behind
/// always see whole tiles.
template <class E>
REMORA_INLINE Tile<E> whole_tile(const Tile<E>& rows, int64_t tokens, int64_t dims, int64_t tile_dims, E* copy) {
  if (tokens == kChunk && dims == tile_dims) return rows;
  for (int64_t i = 0; i < kChunk; ++i) {
    for (int64_t d = 0; d < tile_dims; ++d) copy[i * tile_dims + d] = i < tokens && d < dims ? rows.row[i][d] : E{};
  }
  return strided_tile<E>(copy, tile_dims);
}

/// Elements of the copy load_operand may need.
constexpr int64_t operand_copy_size(int64_t dims) { return kChunk * (pad(dims) + kPadding); }

/// Turns tokens [tokens][dims] into an operand of pad(dims) features.
template <class Op, class E>
inline void load_operand(typename Op::Word* operand, const Tile<E>& data, int64_t tokens, int64_t dims, E* copy) {
  using Word = typename Op::Word;
  constexpr int w = kWidth<Word>;
  constexpr int64_t step = w * Op::kPack;
  const int64_t tile_dims = (pad(dims) + step - 1) / step * step;
  const Tile<E> tile = whole_tile(data, tokens, dims, tile_dims, copy);
  const int64_t rows = words<Op>(pad(dims));
  for (int64_t d = 0; d < rows; d += w) {
    for (int c = 0; c < kChunk; c += w) {
      Vec<Word> block[w];
      unroll<w>([&](auto i) REMORA_ALWAYS_INLINE {
        const E* p = tile.row[c + i] + d * Op::kPack;
        if constexpr (Op::kPack == 1) {
          block[i] = load<Word>(p);
        } else {
          block[i] = load<Word>(reinterpret_cast<const Word*>(p));
        }
      });
      transpose(block);
      if (rows - d >= w) {
        unroll<w>([&](auto i) REMORA_ALWAYS_INLINE { store<Word>(operand + (d + i) * kChunk + c, block[i]); });
      } else {
        unroll<w / 2>([&](auto i) REMORA_ALWAYS_INLINE { store<Word>(operand + (d + i) * kChunk + c, block[i]); });
      }
    }
  }
}

/// Sum of squares of every token of an operand.
template <class Op>
REMORA_INLINE void sum_squares(typename Op::Real* out, const typename Op::Word* operand, int64_t n) {
  using T = typename Op::Real;
  using Word = typename Op::Word;
  for (int c = 0; c < kChunk; c += kWidth<T>) {
    Vec<T> acc[4] = {};
    for (int64_t k = 0; k < n; k += 4) {
      unroll<4>([&](auto i) REMORA_ALWAYS_INLINE {
        const Vec<Word> x = load<Word>(operand + (k + i) * kChunk + c);
        Op::accumulate(acc[i], x, x);
      });
    }
    store<T>(out + c, (acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
}

/// What rank_update broadcasts: the operand itself, or [padded][kChunk] bf16 values, pairs along the tokens.
template <class Op>
REMORA_INLINE void token_pairs([[maybe_unused]] typename Op::Word* pairs,
                               [[maybe_unused]] const typename Op::Word* operand, [[maybe_unused]] int64_t n) {
  if constexpr (Op::kPack == 2) {
#if defined(__AVX512BF16__)
    const __m512i index = lane_index([](int i) { return i % 16 * 2 + i / 16; });
    for (int64_t k = 0; k < n; ++k) {
      const __m512i x = _mm512_loadu_si512(operand + k * kChunk);
      _mm512_storeu_si512(pairs + k * kChunk, _mm512_permutexvar_epi16(index, x));
    }
#endif
  }
}

/// A panel of a state one vector wide: values [padded][width] and, if Op packs, the words products read: [padded]
/// rounded values and [padded] values of what rounding took away. What is read to be written back needs both: its
/// errors would add up from chunk to chunk.
template <class Op>
struct Panel {
  using Word = typename Op::Word;
  typename Op::Real* values;
  Word* packed;
  Word* rest;

  /// Panel `tile` of a state [tiles][padded][width].
  static REMORA_INLINE Panel of(typename Op::Real* values, Word* packed, int64_t tile, int64_t padded) {
    constexpr int64_t w = kWidth<typename Op::Real>;
    Word* const rounded = packed + 2 * tile * words<Op>(padded) * w;
    return {values + tile * padded * w, rounded, rounded + words<Op>(padded) * w};
  }
  /// Words that `packed` needs for a whole state.
  static constexpr int64_t packed_size(int64_t padded, int64_t columns) {
    return Op::kPack == 1 ? 0 : 2 * words<Op>(padded) * columns;
  }

  REMORA_INLINE const Word* operand() const {
    if constexpr (Op::kPack == 1) {
      return values;
    } else {
      return packed;
    }
  }

  REMORA_INLINE void pack(int64_t k, Vec<typename Op::Real> even, Vec<typename Op::Real> odd) const {
    constexpr int64_t w = kWidth<typename Op::Real>;
    const Vec<Word> rounded = Op::pack(even, odd);
    store<Word>(packed + k / 2 * w, rounded);
    store<Word>(rest + k / 2 * w, Op::pack_rest(even, odd, rounded));
  }
};

/// acc[i] = sum over the padded features of operand[.][i] * panel[.], with the panel unrounded.
template <class Op>
REMORA_INLINE void multiply_panel(Vec<typename Op::Real> (&acc)[kChunk], const typename Op::Word* operand,
                                  const Panel<Op>& panel, int64_t padded) {
  constexpr int64_t w = kWidth<typename Op::Real>;
  multiply<Op>(acc, operand, panel.operand(), w, words<Op>(padded));
  if constexpr (Op::kPack == 2) multiply_add<Op>(acc, operand, panel.rest, w, words<Op>(padded));
}

/// panel = decay * panel + sum over tokens and terms of token_pairs[.][i] * u[i].
template <class Op, int kTerms>
REMORA_INLINE void rank_update(Panel<Op> panel, int64_t padded, typename Op::Real decay,
                               const typename Op::Word* const (&x)[kTerms],
                               const Vec<typename Op::Real> (&u)[kTerms][kChunk]) {
  using T = typename Op::Real;
  using Word = typename Op::Word;
  constexpr int w = kWidth<T>;
  constexpr int rows = kChunk / 2;
  if constexpr (Op::kPack == 1) {
    unroll<kTerms>([&](auto term) REMORA_ALWAYS_INLINE {
      for (int64_t k = 0; k < padded; k += rows) {
        Vec<T> s[rows];
        unroll<rows>([&](auto r) REMORA_ALWAYS_INLINE { s[r] = load<T>(panel.values + (k + r) * w); });
        if (term == 0) unroll<rows>([&](auto r) REMORA_ALWAYS_INLINE { s[r] *= decay; });
        const Word* xk = x[term] + k * kChunk;
        unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
          unroll<rows>([&](auto r) REMORA_ALWAYS_INLINE { s[r] += xk[r * kChunk + i] * u[term][i]; });
        });
        unroll<rows>([&](auto r) REMORA_ALWAYS_INLINE { store<T>(panel.values + (k + r) * w, s[r]); });
      }
    });
  } else {
    Vec<Word> pairs[kTerms][kChunk];  // rounded, then the rests
    unroll<kTerms>([&](auto t) REMORA_ALWAYS_INLINE {
      unroll<kChunk / 2>([&](auto i) REMORA_ALWAYS_INLINE {
        pairs[t][i] = Op::pack(u[t][2 * i], u[t][2 * i + 1]);
        pairs[t][kChunk / 2 + i] = Op::pack_rest(u[t][2 * i], u[t][2 * i + 1], pairs[t][i]);
      });
    });
    for (int64_t k = 0; k < padded; k += rows) {
      Vec<T> s[rows];
      unroll<rows>([&](auto r) REMORA_ALWAYS_INLINE { s[r] = load<T>(panel.values + (k + r) * w) * decay; });
      unroll<kTerms>([&](auto t) REMORA_ALWAYS_INLINE {
        const Word* xk = x[t] + k * (kChunk / 2);
        unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
          unroll<rows>([&](auto r) REMORA_ALWAYS_INLINE {
            Op::accumulate(s[r], xk[r * (kChunk / 2) + i % (kChunk / 2)], pairs[t][i]);
          });
        });
      });
      unroll<rows>([&](auto r) REMORA_ALWAYS_INLINE { store<T>(panel.values + (k + r) * w, s[r]); });
      unroll<rows / 2>([&](auto r) REMORA_ALWAYS_INLINE { panel.pack(k + 2 * r, s[2 * r], s[2 * r + 1]); });
    }
  }
}

/// rank_update of panels `distance` apart, for an Op that does not pack; u [kTerms][kPanels][kChunk][width].
template <class Op, int kPanels, int kTerms>
REMORA_INLINE void rank_update_abreast(typename Op::Real* panel, int64_t distance, int64_t padded,
                                       typename Op::Real decay, const typename Op::Word* const (&x)[kTerms],
                                       const typename Op::Real* u) {
  using T = typename Op::Real;
  constexpr int w = kWidth<T>, rows = kChunk / kPanels;
  for (int64_t k = 0; k < padded; k += rows) {
    Vec<T> s[kPanels][rows];
    const auto at = [&](auto p, auto r) REMORA_ALWAYS_INLINE { return panel + p * distance + (k + r) * w; };
    const auto each = [&](auto f) REMORA_ALWAYS_INLINE {
      unroll<rows>([&](auto r)
                       REMORA_ALWAYS_INLINE { unroll<kPanels>([&](auto p) REMORA_ALWAYS_INLINE { f(p, r); }); });
    };
    each([&](auto p, auto r) REMORA_ALWAYS_INLINE { s[p][r] = load<T>(at(p, r)) * decay; });
    unroll<kTerms>([&](auto term) REMORA_ALWAYS_INLINE {
      const T* xk = x[term] + k * kChunk;
      for (int i = 0; i < kChunk; ++i) {
        Vec<T> y[kPanels];
        unroll<kPanels>([&](auto p)
                            REMORA_ALWAYS_INLINE { y[p] = load<T>(u + ((term * kPanels + p) * kChunk + i) * w); });
        each([&](auto p, auto r) REMORA_ALWAYS_INLINE { Op::accumulate(s[p][r], xk[r * kChunk + i], y[p]); });
      }
    });
    each([&](auto p, auto r) REMORA_ALWAYS_INLINE { store<T>(at(p, r), s[p][r]); });
  }
}

/// Fills the packed words of a panel from its values.
template <class Op>
REMORA_INLINE void pack_panel(Panel<Op> panel, int64_t padded) {
  if constexpr (Op::kPack == 2) {
    using T = typename Op::Real;
    constexpr int w = kWidth<T>;
    for (int64_t k = 0; k < padded; k += 2) {
      panel.pack(k, load<T>(panel.values + k * w), load<T>(panel.values + (k + 1) * w));
    }
  }
}

}  // namespace remora::REMORA_CPU_ISA
