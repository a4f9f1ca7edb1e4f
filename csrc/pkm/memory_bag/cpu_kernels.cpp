// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/cpu/arena.h"
#include "common/cpu/element_types.h"
#include "pkm/memory_bag/cpu.h"
#include "pkm/memory_bag/cpu_gather.h"

namespace remora::REMORA_CPU_ISA {
namespace {

/// Rows that are asked for ahead of use: enough to cover the latency of memory, few enough to stay in L1.
constexpr int64_t kAhead = 4;

/// What a run of lookups reads: pointers to rows, and the lookups they belong to. kAhead more pointers at the end, so
/// that fetching ahead needs no bounds.
template <class E>
struct Run {
  const E** rows;
  int32_t* lookups;
  int64_t size = 0;

  Run(int64_t capacity, Arena& arena)
      : rows(arena.take<const E*>(capacity + kAhead + kGatherRows)), lookups(arena.take<int32_t>(capacity)) {}
  void add(const E* row, int64_t lookup) {
    rows[size] = row;
    lookups[size++] = static_cast<int32_t>(lookup);
  }
  void close() { std::fill_n(rows + size, kAhead + kGatherRows, size ? rows[size - 1] : nullptr); }
};

/// weights[i] of the lookups of a run in head b.
template <class T>
REMORA_INLINE void load_weights(const void* weights, const int32_t* lookups, int count, int64_t heads, int64_t b,
                                T* out) {
  for (int k = 0; k < count; ++k) out[k] = weights ? static_cast<const T*>(weights)[lookups[k] * heads + b] : T(1);
}

template <class T, class E>
struct FwdScratch {
  Run<E> run;
  T* sum;  // [d]

  FwdScratch(const BagShape& shape, Arena& arena) : run(shape.lookups, arena), sum(arena.take<T>(shape.width)) {}
};

template <class Scratch>
int64_t scratch_bytes(const BagShape& shape) {
  Arena arena(nullptr);
  Scratch scratch(shape, arena);
  return arena.used();
}

template <class T, class E>
void fwd(const MemoryBagFwdParams& p, int64_t begin, int64_t end, int64_t first_column, int64_t last_column,
         void* buffer) {
  const BagShape& shape = p.shape;
  const int64_t block = shape.width / shape.heads, columns = last_column - first_column;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t group = 0; group < shape.out_groups; ++group) {
      Arena arena(buffer);
      FwdScratch<T, E> scratch(shape, arena);
      Run<E>& run = scratch.run;
      for (int64_t j = 0; j < shape.lookups; ++j) {
        const Slot slot = locate(shape.map, shape.indices[token * shape.lookups + j]);
        if (slot.row < 0 || (shape.out_groups > 1 && slot.group != group)) continue;
        run.add(static_cast<const E*>(p.table) + slot.row * shape.width + first_column, token * shape.lookups + j);
      }
      run.close();
      E* out = static_cast<E*>(p.out) + shape.out_row(token, static_cast<uint32_t>(group)) * shape.width;
      for (int64_t b = 0; b < shape.heads; ++b) {
        const int64_t at = b * block;
        if (run.size == 0) std::fill_n(scratch.sum, columns, T(0));
        for (int64_t i = 0; i < run.size; i += kGatherRows) {
          const int count = static_cast<int>(std::min<int64_t>(kGatherRows, run.size - i));
          const E *rows[kGatherRows], *next[kGatherRows];
          T weights[kGatherRows];
          for (int k = 0; k < count; ++k) rows[k] = run.rows[i + k] + at, next[k] = run.rows[i + k + kAhead] + at;
          load_weights(p.weights, run.lookups + i, count, shape.heads, b, weights);
          gather<true, false, T, E>(count, rows, next, columns, i == 0, weights, scratch.sum, nullptr, nullptr);
        }
        for (int64_t c = 0; c < columns; c += kWidth<T>) {
          store_lanes<T>(out + at + first_column + c, columns - c, load_lanes<T>(scratch.sum + c, columns - c));
        }
      }
    }
  }
}

template <class T, class E>
void bwd_weights(const MemoryBagWeightsParams& p, int64_t begin, int64_t end) {
  const BagShape& shape = p.shape;
  const int64_t block = shape.width / shape.heads;
  const auto row_of = [&](Slot slot) {
    return static_cast<const E*>(p.table) + (slot.row < 0 ? 0 : slot.row) * shape.width;
  };
  for (int64_t m = begin * shape.lookups; m < end * shape.lookups; ++m) {
    const Slot slot = locate(shape.map, shape.indices[m]);
    T* d_weights = static_cast<T*>(p.d_weights) + m * shape.heads;
    if (slot.row < 0) {
      std::fill_n(d_weights, shape.heads, T(0));
      continue;
    }
    const E* row = row_of(slot);
    const int64_t ahead = std::min(m + kAhead, end * shape.lookups - 1);
    const E* next = row_of(locate(shape.map, shape.indices[ahead]));
    const E* d_out = static_cast<const E*>(p.d_out) + shape.out_row(m / shape.lookups, slot.group) * shape.width;
    for (int64_t b = 0; b < shape.heads; ++b) {
      const E *rows[1] = {row + b * block}, *nexts[1] = {next + b * block};
      gather<1, false, true, T, E>(rows, nexts, block, true, nullptr, nullptr, d_out + b * block, d_weights + b);
    }
  }
}

/// Row of the workspace that the piece of a segment of several pieces writes which begins at a position. Pieces that
/// begin segments are at least kPieceLookups apart, and so are the others.
constexpr int64_t piece_row(int64_t position, bool is_first) { return position / kPieceLookups * 2 + !is_first; }

template <class T>
T* piece_sums(const MemoryBagBwdParams& p, int64_t position, bool is_first) {
  return static_cast<T*>(p.workspace) + piece_row(position, is_first) * p.shape.width;
}

/// Columns [at, at + width) of the sum of segment u to where it belongs.
template <class T, class E>
void write_sum(const MemoryBagBwdParams& p, int64_t u, int64_t at, int64_t width, const T* sum) {
  const int64_t row = p.kind == RowGradient::kRows ? u : p.rows[u];
  const auto to_row = [&]<class D>(D* to) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
    for (int64_t c = 0; c < width; c += kWidth<T>) {
      const int64_t lanes = width - c;
      if (p.kind == RowGradient::kAccumulate) {
        store_lanes<T>(to + c, lanes, load_lanes<T>(to + c, lanes) + load_lanes<T>(sum + c, lanes));
      } else if (std::is_same_v<T, D> && is_aligned && lanes >= kWidth<T>) {
        stream<T>(reinterpret_cast<T*>(to + c), load<T>(sum + c));
      } else {
        store_lanes<T>(to + c, lanes, load_lanes<T>(sum + c, lanes));
      }
    }
  };
  if (p.kind == RowGradient::kDense) {
    to_row(static_cast<E*>(p.d_table) + row * p.d_table_stride + at);
  } else {
    to_row(static_cast<T*>(p.d_table) + row * p.d_table_stride + at);
  }
}

/// Sorted positions that one call of bwd() may read: its own, and what pieces that begin there reach beyond.
constexpr int64_t kBwdPositions = 5 * kPieceLookups;

template <class T, class E>
struct BwdScratch {
  Run<E> run;
  T* weights;  // [h, kBwdPositions]
  T* sum;      // [d]

  BwdScratch(const BagShape& shape, Arena& arena)
      : run(kBwdPositions, arena),
        weights(arena.take<T>(shape.heads * kBwdPositions)),
        sum(arena.take<T>(shape.width)) {}
  T* weights_of(int64_t b) const { return weights + b * kBwdPositions; }
};

template <bool kDots, class T, class E>
void bwd_piece(const MemoryBagBwdParams& p, BwdScratch<T, E>& scratch, int64_t u, int64_t first, int64_t count,
               T* to_piece) {
  const BagShape& shape = p.shape;
  const int64_t block = shape.width / shape.heads;
  const Run<E>& run = scratch.run;
  for (int64_t b = 0; b < shape.heads; ++b) {
    const int64_t at = b * block;
    const E* row = kDots ? static_cast<const E*>(p.table) + p.rows[u] * shape.width + at : nullptr;
    T* sum = to_piece ? to_piece + at : scratch.sum + at;
    for (int64_t i = first; i < first + count; i += kGatherRows) {
      const int size = static_cast<int>(std::min<int64_t>(kGatherRows, first + count - i));
      const E *rows[kGatherRows], *next[kGatherRows];
      T dots[kGatherRows];
      for (int k = 0; k < size; ++k) rows[k] = run.rows[i + k] + at, next[k] = run.rows[i + k + kAhead] + at;
      gather<true, kDots, T, E>(size, rows, next, block, i == first, scratch.weights_of(b) + i, sum, row, dots);
      for (int k = 0; kDots && k < size; ++k) {
        static_cast<T*>(p.d_weights)[run.lookups[i + k] * shape.heads + b] = dots[k];
      }
    }
    if (!to_piece && u < p.num_rows[0]) write_sum<T, E>(p, u, at, block, sum);
  }
}

template <class T, class E>
void bwd(const MemoryBagBwdParams& p, int64_t begin, int64_t end, void* buffer) {
  const BagShape& shape = p.shape;
  const int64_t num_segments = p.num_rows[1], num_found = p.starts[num_segments];
  Arena arena(buffer);
  BwdScratch<T, E> scratch(shape, arena);
  Run<E>& run = scratch.run;
  for (int64_t i = begin; i < std::min(end + kPieceLookups, num_found); ++i) {
    const int64_t m = p.order[i], token = static_cast<uint32_t>(m) / static_cast<uint32_t>(shape.lookups);
    const uint32_t group = shape.out_groups > 1 ? locate(shape.map, shape.indices[m]).group : 0;
    run.add(static_cast<const E*>(p.d_out) + shape.out_row(token, group) * shape.width, m);
    if (p.d_weights) __builtin_prefetch(static_cast<T*>(p.d_weights) + m * shape.heads, 1, 3);
  }
  run.close();
  // Weights belong to lookups anywhere: a loop of their own lets the processor wait for many at once.
  for (int64_t b = 0; b < shape.heads; ++b) {
    load_weights(p.weights, run.lookups, static_cast<int>(run.size), shape.heads, b, scratch.weights_of(b));
  }
  if (p.d_weights) {
    for (int64_t i = std::max(begin, num_found); i < end; ++i) {
      std::fill_n(static_cast<T*>(p.d_weights) + p.order[i] * shape.heads, shape.heads, T(0));
    }
  }

  // The segment that reaches into the range from before, then those that begin in it.
  int64_t u = std::upper_bound(p.starts, p.starts + num_segments, begin) - p.starts - 1;
  for (u = std::max<int64_t>(u, 0); u < num_segments && p.starts[u] < end; ++u) {
    const int64_t start = p.starts[u], stop = p.starts[u + 1];
    if (p.d_weights && u + 1 < num_segments) {
      prefetch_row(static_cast<const E*>(p.table) + p.rows[u + 1] * shape.width, shape.width);
    }
    const int64_t skipped = start < begin ? (begin - start + kPieceLookups - 1) / kPieceLookups : 0;
    for (int64_t first = start + skipped * kPieceLookups; first < std::min(stop, end); first += kPieceLookups) {
      const int64_t count = std::min(kPieceLookups, stop - first);
      T* to_piece = stop - start > kPieceLookups ? piece_sums<T>(p, first, first == start) : nullptr;
      if (p.d_weights) {
        bwd_piece<true, T, E>(p, scratch, u, first - begin, count, to_piece);
      } else {
        bwd_piece<false, T, E>(p, scratch, u, first - begin, count, to_piece);
      }
    }
  }
  finish_streams();
}

template <class T, class E>
void bwd_combine(const MemoryBagBwdParams& p, int64_t window) {
  const int64_t begin = window * kPieceLookups, num_segments = p.num_rows[1], width = p.shape.width;
  // A segment of several pieces is the last that begins in its window.
  const int64_t u = std::lower_bound(p.starts, p.starts + num_segments, begin + kPieceLookups) - p.starts - 1;
  if (u < 0 || u >= p.num_rows[0] || p.starts[u] < begin || p.starts[u + 1] - p.starts[u] <= kPieceLookups) return;
  T* sum = piece_sums<T>(p, p.starts[u], true);
  for (int64_t first = p.starts[u] + kPieceLookups; first < p.starts[u + 1]; first += kPieceLookups) {
    const T* piece = piece_sums<T>(p, first, false);
    for (int64_t c = 0; c < width; ++c) sum[c] += piece[c];
  }
  write_sum<T, E>(p, u, 0, width, sum);
  finish_streams();
}

template <class T, class E>
void bwd_zero(const MemoryBagBwdParams& p, int64_t begin, int64_t end) {
  const bool is_dense = p.kind == RowGradient::kDense;
  const int64_t size = is_dense ? sizeof(E) : sizeof(T), num_written = p.num_rows[0];
  int64_t u = is_dense ? std::lower_bound(p.rows, p.rows + num_written, begin) - p.rows : num_written;
  for (int64_t row = begin; row < end; ++row) {
    if (is_dense && u < num_written && p.rows[u] == row) {
      ++u;
    } else if (is_dense || row >= num_written) {
      std::memset(static_cast<char*>(p.d_table) + row * p.d_table_stride * size, 0, p.shape.width * size);
    }
  }
}

/// act(x) and its derivative.
template <class T>
struct Activated {
  T value, slope;

  Activated(Activation act, T x) {
    if (act == Activation::kIdentity) {
      value = x, slope = 1;
    } else if (act == Activation::kRelu) {
      value = x > 0 || x != x ? x : T(0), slope = x > 0;
    } else if (act == Activation::kGelu) {
      const T below = T(0.5) * std::erfc(x * T(-0.70710678118654752440));  // of the normal distribution
      value = x * below, slope = below + x * T(0.39894228040143267794) * std::exp(x * x * T(-0.5));
    } else {
      const T gate = T(1) / (T(1) + std::exp(-x));
      value = x * gate, slope = gate * (T(1) + x * (T(1) - gate));
    }
  }
};

template <class T, class E>
struct PeerScratch {
  Run<E> run;
  T* sum;  // [max(dp, dv)]

  PeerScratch(const BagShape& shape, int64_t query_width, Arena& arena)
      : run(shape.lookups, arena), sum(arena.take<T>(std::max(shape.width, query_width))) {}

  template <class Params>
  void find(const Params& p, int64_t token) {
    for (int64_t m = token * p.shape.lookups; m < (token + 1) * p.shape.lookups; ++m) {
      const Slot slot = locate(p.shape.map, p.shape.indices[m]);
      if (slot.row >= 0) run.add(static_cast<const E*>(p.table) + slot.row * p.row_width(), m);
    }
    run.close();
  }
  /// Rows i ... of the run and those to fetch meanwhile, from column `at`; returns how many.
  int rows_at(int64_t i, int64_t at, const E** rows, const E** next) const {
    const int count = static_cast<int>(std::min<int64_t>(kGatherRows, run.size - i));
    for (int k = 0; k < count; ++k) rows[k] = run.rows[i + k] + at, next[k] = run.rows[i + k + kAhead] + at;
    return count;
  }
  void store_sum(int64_t width, E* out) const {
    for (int64_t c = 0; c < width; c += kWidth<T>) {
      store_lanes<T>(out + c, width - c, load_lanes<T>(sum + c, width - c));
    }
  }
};

template <class T, class E>
int64_t peer_scratch(const BagShape& shape, int64_t query_width) {
  Arena arena(nullptr);
  PeerScratch<T, E> scratch(shape, query_width, arena);
  return arena.used();
}

template <class T, class E>
void peer_fwd(const PeerBagFwdParams& p, int64_t token, void* buffer) {
  const BagShape& shape = p.shape;
  const int64_t block = shape.width / shape.heads;
  Arena arena(buffer);
  PeerScratch<T, E> scratch(shape, p.query_width, arena);
  scratch.find(p, token);
  std::fill_n(scratch.sum, shape.width, T(0));
  const E* x = static_cast<const E*>(p.x) + token * p.query_width;
  for (int64_t i = 0; i < scratch.run.size; i += kGatherRows) {
    const E *rows[kGatherRows], *next[kGatherRows];
    T scores[kGatherRows], weights[kGatherRows];
    const int count = scratch.rows_at(i, 0, rows, next);
    gather<false, true, T, E>(count, rows, next, p.query_width, true, nullptr, nullptr, x, scores);
    for (int64_t b = 0; b < shape.heads; ++b) {
      scratch.rows_at(i, p.query_width + b * block, rows, next);
      load_weights(p.weights, scratch.run.lookups + i, count, shape.heads, b, weights);
      for (int k = 0; k < count; ++k) weights[k] *= Activated<T>(p.act, scores[k]).value;
      gather<true, false, T, E>(count, rows, next, block, false, weights, scratch.sum + b * block, nullptr, nullptr);
    }
  }
  scratch.store_sum(shape.width, static_cast<E*>(p.out) + token * shape.width);
}

template <class T, class E>
void peer_bwd(const PeerBagBwdParams& p, int64_t token, void* buffer) {
  const BagShape& shape = p.shape;
  const int64_t heads = shape.heads, block = shape.width / heads, first = token * shape.lookups;
  Arena arena(buffer);
  PeerScratch<T, E> scratch(shape, p.query_width, arena);
  scratch.find(p, token);
  std::fill_n(scratch.sum, p.query_width, T(0));
  // For what is no lookup; the others are written below.
  if (p.d_weights) std::fill_n(static_cast<T*>(p.d_weights) + first * heads, shape.lookups * heads, T(0));
  if (p.factors) std::fill_n(static_cast<T*>(p.factors) + first * heads, shape.lookups * heads, T(0));
  if (p.d_scores) std::fill_n(static_cast<T*>(p.d_scores) + first, shape.lookups, T(0));
  const E* x = static_cast<const E*>(p.x) + token * p.query_width;
  const E* d_out = static_cast<const E*>(p.d_out) + token * shape.width;
  for (int64_t i = 0; i < scratch.run.size; i += kGatherRows) {
    const int32_t* lookups = scratch.run.lookups + i;
    const E *rows[kGatherRows], *next[kGatherRows];
    T scores[kGatherRows], dots[kGatherRows], weights[kGatherRows], d_scores[kGatherRows] = {};
    const int count = scratch.rows_at(i, 0, rows, next);
    gather<false, true, T, E>(count, rows, next, p.query_width, true, nullptr, nullptr, x, scores);
    for (int64_t b = 0; b < heads; ++b) {
      scratch.rows_at(i, p.query_width + b * block, rows, next);
      gather<false, true, T, E>(count, rows, next, block, true, nullptr, nullptr, d_out + b * block, dots);
      load_weights(p.weights, lookups, count, heads, b, weights);
      for (int k = 0; k < count; ++k) {
        const T value = Activated<T>(p.act, scores[k]).value;
        d_scores[k] += weights[k] * dots[k];
        if (p.d_weights) static_cast<T*>(p.d_weights)[lookups[k] * heads + b] = value * dots[k];
        if (p.factors) static_cast<T*>(p.factors)[lookups[k] * heads + b] = value * weights[k];
      }
    }
    for (int k = 0; k < count; ++k) {
      d_scores[k] *= Activated<T>(p.act, scores[k]).slope;
      if (p.d_scores) static_cast<T*>(p.d_scores)[lookups[k]] = d_scores[k];
    }
    scratch.rows_at(i, 0, rows, next);
    gather<true, false, T, E>(count, rows, rows, p.query_width, false, d_scores, scratch.sum, nullptr, nullptr);
  }
  scratch.store_sum(p.query_width, static_cast<E*>(p.d_x) + token * p.query_width);
}

template <class T, class E>
constexpr MemoryBagCpuKernels kKernels = {
    scratch_bytes<FwdScratch<T, E>>,
    fwd<T, E>,
    bwd_weights<T, E>,
    scratch_bytes<BwdScratch<T, E>>,
    bwd<T, E>,
    bwd_combine<T, E>,
    bwd_zero<T, E>,
    peer_scratch<T, E>,
    peer_fwd<T, E>,
    peer_bwd<T, E>,
};

}  // namespace

const MemoryBagCpuKernels& memory_bag_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
