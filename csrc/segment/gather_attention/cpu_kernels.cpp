// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
//
// Two products do all the work, for one or four rows x at a time and n rows y that lie anywhere:
//   dots        s[i][j] = <x_i, y_j>
//   accumulate  x_i += sum_j p[i][j] y_j
// Rows x are query heads and rows y keys where a query owns the result, and the other way round where a block does.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/cpu/arena.h"
#include "common/cpu/element_types.h"
#include "common/cpu/functions.h"
#include "segment/gather_attention/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

constexpr int64_t kTile = 128;  // rows y
constexpr int64_t kRows = 4;    // rows x

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

/// Elements of a row in T, zeros up to a whole vector.
template <class T>
constexpr int64_t padded(int64_t dim) {
  return (dim + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

template <class T, class E>
REMORA_INLINE void widen(const E* row, int64_t dim, T* to) {
  for (int64_t d = 0; d < dim; d += kWidth<T>) store<T>(to + d, load_lanes<T>(row, d, dim));
}

template <class T, class E>
REMORA_INLINE void narrow(const T* row, T factor, int64_t dim, E* to) {
  for (int64_t d = 0; d < dim; d += kWidth<T>) store_lanes<T>(to, d, dim, load<T>(row + d) * factor);
}

/// s [kCount][kTile] = products of kCount rows x [kCount][padded] and n rows y, factors of what lies behind n
/// unspecified.
template <int kCount, class T, class E>
REMORA_INLINE void dots_of(T* s, const T* x, const E* const* y, int64_t n, int64_t dim) {
  constexpr int w = kWidth<T>;
  const int64_t stride = padded<T>(dim);
  for (int64_t j = 0; j < n; j += w) {
    Vec<T> sums[kCount][w];
    for (int64_t i = 0; i < w; ++i) {
      const E* row = y[std::min(j + i, n - 1)];
      Vec<T> acc[kCount] = {};
      int64_t d = 0;
      for (; d + w <= dim; d += w) {
        const Vec<T> e = load<T>(row + d);
        unroll<kCount>([&](auto c) REMORA_ALWAYS_INLINE { acc[c] += e * load<T>(x + c * stride + d); });
      }
      if (d < dim) {
        const Vec<T> e = load_first<T>(row + d, dim - d);
        unroll<kCount>([&](auto c) REMORA_ALWAYS_INLINE { acc[c] += e * load<T>(x + c * stride + d); });
      }
      unroll<kCount>([&](auto c) REMORA_ALWAYS_INLINE { sums[c][i] = acc[c]; });
    }
    unroll<kCount>([&](auto c) REMORA_ALWAYS_INLINE { store<T>(s + c * kTile + j, sum_rows(sums[c])); });
  }
}

/// x [kCount][padded] += p [kCount][kTile] y.
template <int kCount, class T, class E>
REMORA_INLINE void accumulate_of(T* x, const T* p, const E* const* y, int64_t n, int64_t dim) {
  constexpr int w = kWidth<T>, kVectors = kNumRegisters / 2 / kCount < 4 ? kNumRegisters / 2 / kCount : 4;
  const int64_t stride = padded<T>(dim);
  int64_t d = 0;
  for (; d + kVectors * w <= dim; d += kVectors * w) {
    Vec<T> acc[kCount][kVectors];
    unroll<kCount>([&](auto c) REMORA_ALWAYS_INLINE {
      unroll<kVectors>([&](auto v) REMORA_ALWAYS_INLINE { acc[c][v] = load<T>(x + c * stride + d + v * w); });
    });
    for (int64_t j = 0; j < n; ++j) {
      Vec<T> e[kVectors];
      unroll<kVectors>([&](auto v) REMORA_ALWAYS_INLINE { e[v] = load<T>(y[j] + d + v * w); });
      unroll<kCount>([&](auto c) REMORA_ALWAYS_INLINE {
        const T factor = p[c * kTile + j];
        unroll<kVectors>([&](auto v) REMORA_ALWAYS_INLINE { acc[c][v] += factor * e[v]; });
      });
    }
    unroll<kCount>([&](auto c) REMORA_ALWAYS_INLINE {
      unroll<kVectors>([&](auto v) REMORA_ALWAYS_INLINE { store<T>(x + c * stride + d + v * w, acc[c][v]); });
    });
  }
  for (; d < dim; d += w) {
    Vec<T> acc[kCount];
    unroll<kCount>([&](auto c) REMORA_ALWAYS_INLINE { acc[c] = load<T>(x + c * stride + d); });
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> e = load_lanes<T>(y[j], d, dim);
      unroll<kCount>([&](auto c) REMORA_ALWAYS_INLINE { acc[c] += p[c * kTile + j] * e; });
    }
    unroll<kCount>([&](auto c) REMORA_ALWAYS_INLINE { store<T>(x + c * stride + d, acc[c]); });
  }
}

/// The same for `count` <= kRows rows.
template <class T, class E>
void dots(T* s, const T* x, int64_t count, const E* const* y, int64_t n, int64_t dim) {
  if (count == kRows) return dots_of<kRows>(s, x, y, n, dim);
  for (int64_t c = 0; c < count; ++c) dots_of<1>(s + c * kTile, x + c * padded<T>(dim), y, n, dim);
}
template <class T, class E>
void accumulate(T* x, const T* p, int64_t count, const E* const* y, int64_t n, int64_t dim) {
  if (count == kRows) return accumulate_of<kRows>(x, p, y, n, dim);
  for (int64_t c = 0; c < count; ++c) accumulate_of<1>(x + c * padded<T>(dim), p + c * kTile, y, n, dim);
}

/// Keys that a query reads, up to kTile at a time.
template <class E>
struct KeyTile {
  const E* k[kTile];
  const E* v[kTile];
  int64_t size = 0;
};

/// A query of a unit of heads.
template <class T, class E>
struct UnitQuery {
  const GatherAttentionInputs& in;
  int64_t b, t, first_head, num_heads, list, key_head;
  VisibleKeys visible;

  UnitQuery(const GatherAttentionInputs& in, int64_t b, int64_t t, int64_t unit)
      : in(in),
        b(b),
        t(t),
        first_head(unit * in.unit_heads()),
        num_heads(in.unit_heads()),
        list(first_head / in.list_heads()),
        key_head(first_head / in.group()),
        visible(visible_keys(in, t)) {}

  int64_t row(int64_t head) const { return (b * in.packed.seqlen + t) * in.num_heads + first_head + head; }
  int64_t first_lookup() const { return ((b * in.packed.seqlen + t) * in.num_lists + list) * in.num_chosen; }
  /// Where what a softmax of a head keeps lies: m is the block, of two levels.
  int64_t softmax(int64_t head, int64_t m) const { return row(head) * in.num_softmaxes() + m; }
  T weight(int64_t m) const { return in.is_two_level() ? static_cast<const T*>(in.weight)[first_lookup() + m] : T{1}; }

  /// Calls body(tile, m) with all keys in order: tiles fill up across blocks, or of two levels hold block m.
  template <class Body>
  void for_tiles(const Body& body) const {
    KeyTile<E> tile;
    const E* k = static_cast<const E*>(in.k) + in.k_stride.at(b, visible.key_begin, key_head);
    const E* v = static_cast<const E*>(in.v) + in.v_stride.at(b, visible.key_begin, key_head);
    for (int64_t m = 0; m < in.num_chosen; ++m) {
      const int64_t index = in.idx[first_lookup() + m], count = visible.count(index, in.block);
      for (int64_t j = index * in.block; j < index * in.block + count; ++j) {
        if (tile.size == kTile) body(tile, m), tile.size = 0;
        tile.k[tile.size] = k + j * in.k_stride.token;
        tile.v[tile.size++] = v + j * in.v_stride.token;
      }
      if (in.is_two_level() && tile.size > 0) body(tile, m), tile.size = 0;
    }
    if (tile.size > 0) body(tile, in.num_chosen - 1);
  }
};

/// Buffers of one thread for the heads of a unit, [heads][padded] and a tile of scores [kRows][kTile].
template <class T>
struct QueryBuffers {
  T *q, *d_o, *sums;
  T *s, *dp;
  T *greatest, *total;  // [heads]; of the backward pass: lse, and what dP loses

  QueryBuffers(const GatherAttentionInputs& in, Arena& arena)
      : q(arena.take<T>(in.unit_heads() * padded<T>(in.dim))),
        d_o(arena.take<T>(in.unit_heads() * padded<T>(in.dim))),
        sums(arena.take<T>(in.unit_heads() * padded<T>(in.dim))),
        s(arena.take<T>(kRows * kTile)),
        dp(arena.take<T>(kRows * kTile)),
        greatest(arena.take<T>(in.unit_heads())),
        total(arena.take<T>(in.unit_heads())) {}
};

template <class T>
int64_t query_scratch(const GatherAttentionInputs& in) {
  Arena arena(nullptr);
  QueryBuffers<T>(in, arena);
  return arena.used();
}

/// Lanes [0, n) of a vector.
template <class T>
REMORA_INLINE auto first_lanes(int64_t n) {
  Vec<T> lane;
  for (int i = 0; i < kWidth<T>; ++i) lane[i] = static_cast<T>(i);
  return lane < static_cast<T>(n);
}

/// Greatest of s * scale, n of them.
template <class T>
REMORA_INLINE T greatest_of(const T* s, int64_t n, T scale) {
  T greatest = -kInfinity<T>;
  Vec<T> best = broadcast(-kInfinity<T>);
  for (int64_t j = 0; j < n; j += kWidth<T>) {
    Vec<T> x = load<T>(s + j) * scale;
    if (n - j < kWidth<T>) x = first_lanes<T>(n - j) ? x : broadcast(-kInfinity<T>);
    best = x > best ? x : best;
  }
  for (int i = 0; i < kWidth<T>; ++i) greatest = std::max(greatest, best[i]);
  return greatest;
}

/// s = exp(s * scale - shift), zeros behind n up to a whole vector; the sum.
template <class T>
REMORA_INLINE T exponentials(T* s, int64_t n, T scale, T shift) {
  Vec<T> total{};
  for (int64_t j = 0; j < n; j += kWidth<T>) {
    Vec<T> p = exp_nonpositive(load<T>(s + j) * scale - shift);
    if (n - j < kWidth<T>) p = first_lanes<T>(n - j) ? p : Vec<T>{};
    store<T>(s + j, p);
    total += p;
  }
  return sum<T>(total);
}

template <class T>
REMORA_INLINE void scale_row(T* x, T factor, int64_t n) {
  for (int64_t j = 0; j < n; j += kWidth<T>) store<T>(x + j, load<T>(x + j) * factor);
}

template <class T, class E>
void fwd(const GatherAttentionFwdParams& p, int64_t b, int64_t t, int64_t unit, void* scratch) {
  const GatherAttentionInputs& in = p.in;
  const UnitQuery<T, E> query(in, b, t, unit);
  Arena arena(scratch);
  const QueryBuffers<T> buffers(in, arena);
  const int64_t stride = padded<T>(in.dim);
  const T scale = static_cast<T>(in.scale);
  T* lse = static_cast<T*>(p.lse);
  for (int64_t h = 0; h < query.num_heads; ++h) {
    widen(static_cast<const E*>(in.q) + in.q_stride.at(b, t, query.first_head + h), in.dim, buffers.q + h * stride);
    buffers.greatest[h] = -kInfinity<T>, buffers.total[h] = 0;
    if (in.is_two_level()) std::fill_n(lse + query.softmax(h, 0), in.num_chosen, -kInfinity<T>);
  }
  std::fill_n(buffers.sums, query.num_heads * stride, T{0});
  query.for_tiles([&](const KeyTile<E>& tile, int64_t m) {
    for (int64_t h0 = 0; h0 < query.num_heads; h0 += kRows) {
      const int64_t count = std::min(kRows, query.num_heads - h0);
      dots(buffers.s, buffers.q + h0 * stride, count, tile.k, tile.size, in.dim);
      for (int64_t c = 0; c < count; ++c) {
        T* s = buffers.s + c * kTile;
        T& greatest = buffers.greatest[h0 + c];
        T& total = buffers.total[h0 + c];
        // Scores that are all -infinity weigh nothing.
        const T found = greatest_of(s, tile.size, scale);
        if (in.is_two_level()) {
          const T here = exponentials(s, tile.size, scale, found == -kInfinity<T> ? T{0} : found);
          lse[query.softmax(h0 + c, m)] = found + std::log(here);
          scale_row(s, here == T{0} ? T{0} : query.weight(m) / here, tile.size);
          continue;
        }
        const T before = greatest;
        greatest = std::max(greatest, found);
        const T shift = greatest == -kInfinity<T> ? T{0} : greatest;
        if (before != greatest && total != T{0}) {
          const T factor = std::exp(before - shift);
          total *= factor;
          scale_row(buffers.sums + (h0 + c) * stride, factor, stride);
        }
        total += exponentials(s, tile.size, scale, shift);
      }
      accumulate(buffers.sums + h0 * stride, buffers.s, count, tile.v, tile.size, in.dim);
    }
  });
  for (int64_t h = 0; h < query.num_heads; ++h) {
    const T total = buffers.total[h];
    if (!in.is_two_level()) lse[query.row(h)] = buffers.greatest[h] + std::log(total);
    narrow(buffers.sums + h * stride,
           in.is_two_level() ? T{1}
           : total == T{0}   ? T{0}
                             : T{1} / total,
           in.dim, static_cast<E*>(p.o) + query.row(h) * in.dim);
  }
}

/// What the softmaxes subtract from dP, by UnitQuery::softmax: <dO, o> - d_lse, of two levels times the weight.
template <class T>
int64_t workspace(const GatherAttentionBwdParams& p) {
  const GatherAttentionInputs& in = p.in;
  return in.packed.batch * in.packed.seqlen * in.num_heads * in.num_softmaxes() * static_cast<int64_t>(sizeof(T));
}

/// lse as a shift: what has no keys, or only scores of -infinity, gets probabilities of zero.
template <class T>
REMORA_INLINE T shift_of(T lse) {
  return lse == -kInfinity<T> ? kInfinity<T> : lse;
}

template <class T, class E>
void bwd_query(const GatherAttentionBwdParams& p, int64_t b, int64_t t, int64_t unit, void* scratch) {
  constexpr int w = kWidth<T>;
  const GatherAttentionInputs& in = p.in;
  const UnitQuery<T, E> query(in, b, t, unit);
  Arena arena(scratch);
  const QueryBuffers<T> buffers(in, arena);
  const int64_t stride = padded<T>(in.dim);
  const T scale = static_cast<T>(in.scale);
  const T* lse = static_cast<const T*>(p.lse);
  const T* d_lse = static_cast<const T*>(p.d_lse);
  T* losses = static_cast<T*>(p.workspace);
  const int64_t parts = in.weight_parts();
  T* d_weight = nullptr;  // of the unit, [n][parts]
  if (p.dweight) {
    d_weight =
        static_cast<T*>(p.dweight) + query.first_lookup() * parts + unit % in.heads_of_row() * in.parts_of_unit();
    for (int64_t m = 0; m < in.num_chosen; ++m) std::fill_n(d_weight + m * parts, in.parts_of_unit(), T{0});
  }
  for (int64_t h = 0; h < query.num_heads; ++h) {
    widen(static_cast<const E*>(in.q) + in.q_stride.at(b, t, query.first_head + h), in.dim, buffers.q + h * stride);
    T* d_o = buffers.d_o + h * stride;
    widen(static_cast<const E*>(p.d_o) + p.d_o_stride.at(b, t, query.first_head + h), in.dim, d_o);
    if (in.is_two_level()) {
      std::fill_n(losses + query.softmax(h, 0), in.num_chosen, T{0});
      continue;
    }
    const E* o = static_cast<const E*>(p.o) + query.row(h) * in.dim;
    Vec<T> product{};
    for (int64_t d = 0; d < in.dim; d += w) product += load<T>(d_o + d) * load_lanes<T>(o, d, in.dim);
    const bool is_empty = lse[query.row(h)] == -kInfinity<T>;
    buffers.total[h] = is_empty ? T{0} : sum<T>(product) - (d_lse ? d_lse[query.row(h)] : T{0});
    losses[query.row(h)] = buffers.total[h];
  }
  std::fill_n(buffers.sums, query.num_heads * stride, T{0});
  query.for_tiles([&](const KeyTile<E>& tile, int64_t m) {
    for (int64_t h0 = 0; h0 < query.num_heads; h0 += kRows) {
      const int64_t count = std::min(kRows, query.num_heads - h0);
      dots(buffers.s, buffers.q + h0 * stride, count, tile.k, tile.size, in.dim);
      dots(buffers.dp, buffers.d_o + h0 * stride, count, tile.v, tile.size, in.dim);
      for (int64_t c = 0; c < count; ++c) {
        T *s = buffers.s + c * kTile, *dp = buffers.dp + c * kTile;
        const int64_t at = query.softmax(h0 + c, in.is_two_level() ? m : 0);
        exponentials(s, tile.size, scale, shift_of(lse[at]));
        T loss = buffers.total[h0 + c];
        if (in.is_two_level()) {
          Vec<T> products{};
          for (int64_t j = 0; j < tile.size; j += w) {
            const Vec<T> x = load<T>(s + j) * load<T>(dp + j);
            products += tile.size - j < w ? (first_lanes<T>(tile.size - j) ? x : Vec<T>{}) : x;
          }
          const T product = sum<T>(products);
          if (d_weight) d_weight[m * parts + (h0 + c) / 16] += product;
          loss = query.weight(m) * product - (d_lse && lse[at] != -kInfinity<T> ? d_lse[at] : T{0});
          losses[at] = loss;
        }
        const T weight = query.weight(m);
        for (int64_t j = 0; j < tile.size; j += w) {
          store<T>(s + j, load<T>(s + j) * (load<T>(dp + j) * weight - loss) * scale);
        }
      }
      accumulate(buffers.sums + h0 * stride, buffers.s, count, tile.k, tile.size, in.dim);
    }
  });
  for (int64_t h = 0; h < query.num_heads; ++h) {
    narrow(buffers.sums + h * stride, T{1}, in.dim, static_cast<E*>(p.dq) + query.row(h) * in.dim);
  }
}

constexpr int64_t kQueryTile = 64;  // query rows that a block meets at a time

/// Buffers of one thread for a block: its keys and their gradients [block][padded], a tile of scores.
template <class T>
struct KeyBuffers {
  T *k, *v, *dk, *dv;
  T *s, *dp;

  KeyBuffers(const GatherAttentionInputs& in, Arena& arena)
      : k(arena.take<T>(in.block * padded<T>(in.dim))),
        v(arena.take<T>(in.block * padded<T>(in.dim))),
        dk(arena.take<T>(in.block * padded<T>(in.dim))),
        dv(arena.take<T>(in.block * padded<T>(in.dim))),
        s(arena.take<T>(kRows * kTile)),
        dp(arena.take<T>(kRows * kTile)) {}
};

template <class T>
int64_t keys_scratch(const GatherAttentionInputs& in) {
  Arena arena(nullptr);
  KeyBuffers<T>(in, arena);
  return arena.used();
}

template <class T, class E>
void bwd_keys(const GatherAttentionBwdParams& p, int64_t segment, int64_t of_row, void* scratch) {
  constexpr int w = kWidth<T>;
  const GatherAttentionInputs& in = p.in;
  const int64_t num_lookups = in.num_lookups(), stride = padded<T>(in.dim);
  const int64_t from = clamp_to(p.starts[segment], 0, num_lookups);
  const int64_t to = clamp_to(p.starts[segment + 1], from, num_lookups);
  const KeyBlock block = key_block(in, p.rows[segment]);
  if (from == to || block.size == 0) return;
  const int64_t key_head = block.row_head * in.heads_of_row() + of_row;
  const T scale = static_cast<T>(in.scale);
  Arena arena(scratch);
  const KeyBuffers<T> buffers(in, arena);
  for (int64_t j = 0; j < block.size; ++j) {
    widen(static_cast<const E*>(in.k) + in.k_stride.at(block.b, block.begin + j, key_head), in.dim,
          buffers.k + j * stride);
    widen(static_cast<const E*>(in.v) + in.v_stride.at(block.b, block.begin + j, key_head), in.dim,
          buffers.v + j * stride);
  }
  std::fill_n(buffers.dk, block.size * stride, T{0});
  std::fill_n(buffers.dv, block.size * stride, T{0});

  const E *q[kQueryTile], *d_o[kQueryTile];
  alignas(64) T shift[kQueryTile], loss[kQueryTile], weight[kQueryTile], visible[kQueryTile];
  const int64_t num_rows = (to - from) * in.unit_heads();
  for (int64_t first = 0; first < num_rows; first += kQueryTile) {
    const int64_t n = std::min(kQueryTile, num_rows - first);
    for (int64_t i = 0; i < kQueryTile; ++i) {
      visible[i] = 0, shift[i] = loss[i] = weight[i] = 0;
      if (i >= n) continue;
      const int64_t lookup = clamp_to(p.order[from + (first + i) / in.unit_heads()], 0, num_lookups - 1);
      const int64_t row = lookup / in.num_chosen, m = lookup % in.num_chosen;
      const int64_t list = row % in.num_lists, t = row / in.num_lists % in.packed.seqlen;
      const int64_t b = row / in.num_lists / in.packed.seqlen;
      const int64_t head = list * in.list_heads() + of_row * in.unit_heads() + (first + i) % in.unit_heads();
      const int64_t out = (b * in.packed.seqlen + t) * in.num_heads + head;
      const int64_t at = in.is_two_level() ? out * in.num_chosen + m : out;
      q[i] = static_cast<const E*>(in.q) + in.q_stride.at(b, t, head);
      d_o[i] = static_cast<const E*>(p.d_o) + p.d_o_stride.at(b, t, head);
      shift[i] = shift_of(static_cast<const T*>(p.lse)[at]);
      loss[i] = static_cast<const T*>(p.workspace)[at];
      weight[i] = in.is_two_level() ? static_cast<const T*>(in.weight)[lookup] : T{1};
      visible[i] = static_cast<T>(visible_keys(in, t).count(block.index, in.block));
    }
    for (int64_t j0 = 0; j0 < block.size; j0 += kRows) {
      const int64_t count = std::min(kRows, block.size - j0);
      dots(buffers.s, buffers.k + j0 * stride, count, q, n, in.dim);
      dots(buffers.dp, buffers.v + j0 * stride, count, d_o, n, in.dim);
      for (int64_t c = 0; c < count; ++c) {
        T *s = buffers.s + c * kTile, *dp = buffers.dp + c * kTile;
        for (int64_t i = 0; i < n; i += w) {
          const auto is_visible = load<T>(visible + i) > static_cast<T>(j0 + c);
          const Vec<T> x = exp_nonpositive(load<T>(s + i) * scale - load<T>(shift + i)), factor = load<T>(weight + i);
          const Vec<T> prob = is_visible ? x : Vec<T>{};
          const Vec<T> ds = x * (load<T>(dp + i) * factor - load<T>(loss + i)) * scale;
          store<T>(s + i, prob * factor);
          store<T>(dp + i, is_visible ? ds : Vec<T>{});
        }
      }
      accumulate(buffers.dv + j0 * stride, buffers.s, count, d_o, n, in.dim);
      accumulate(buffers.dk + j0 * stride, buffers.dp, count, q, n, in.dim);
    }
  }
  for (int64_t j = 0; j < block.size; ++j) {
    const int64_t out = ((block.b * in.packed.key_seqlen + block.begin + j) * in.num_key_heads + key_head) * in.dim;
    narrow(buffers.dk + j * stride, T{1}, in.dim, static_cast<E*>(p.dk) + out);
    narrow(buffers.dv + j * stride, T{1}, in.dim, static_cast<E*>(p.dv) + out);
  }
}

template <class T, class E>
constexpr GatherAttentionCpuKernels kKernels = {
    query_scratch<T>, keys_scratch<T>, workspace<T>, fwd<T, E>, bwd_query<T, E>, bwd_keys<T, E>,
};

}  // namespace

const GatherAttentionCpuKernels& gather_attention_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
