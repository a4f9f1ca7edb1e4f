// Kernels of weighted bags.
//
//   table [N, d]   d_out, out [T * G, d]   weights [T, P, h]   order, starts, rows: SlotPlanParams
//
// A head is a block of d / h columns with weights of its own, and nothing else: every kernel treats it as a bag of that
// width. A warp reads 32 vectors of VECTOR elements of a row at once, 16 bytes each where rows allow.
//
// Forward: lookups are summed in pieces of 32 and the pieces added in order, by one warp or by four in turn: the same
// bits either way, so a decoding step may spread one token over four times as many warps.
// Backward: a warp owns kBwdWindow sorted positions and the pieces of segments that begin there, at most kPieceLookups
// long; it reads the row of the table once, and every row of d_out once for both gradients.
//
// Memory bound: README.md.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/reduce.cuh"
#include "pkm/memory_bag/params.h"

namespace remora {

constexpr int kBagWarps = 4;
constexpr int kBagThreads = 32 * kBagWarps;
constexpr int kFwdPiece = 32;    // lookups that are summed before they join the total
constexpr int kFwdInFlight = 8;  // rows a lane has asked for at once
constexpr int kWeightsLookups = 8;
constexpr int kBwdWindow = 32;
constexpr int kBwdInFlight = 2;
constexpr int kZeroWindow = 32;

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<16> {
  using Type = uint4;
};
template <>
struct BitsOf<4> {
  using Type = uint32_t;
};
template <>
struct BitsOf<2> {
  using Type = uint16_t;
};

/// VECTOR neighbouring elements of a row as they lie in memory.
template <typename T, int VECTOR>
union RowVector {
  typename BitsOf<sizeof(T) * VECTOR>::Type bits;
  T element[VECTOR];
};

template <typename T, int VECTOR>
__device__ __forceinline__ RowVector<T, VECTOR> load_row(const T* src) {
  RowVector<T, VECTOR> x;
  x.bits = *reinterpret_cast<const decltype(x.bits)*>(src);
  return x;
}

/// Rounded to T. A float row takes several vectors where those of the operator's dtype have more elements.
template <typename T, int VECTOR>
__device__ __forceinline__ void store_row(T* dst, const float (&value)[VECTOR]) {
  constexpr int kStep = VECTOR * sizeof(T) <= 16 ? VECTOR : 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < VECTOR; i += kStep) {
    RowVector<T, kStep> x;
#pragma unroll
    for (int j = 0; j < kStep; ++j) x.element[j] = static_cast<T>(value[i + j]);
    *reinterpret_cast<decltype(x.bits)*>(dst + i) = x.bits;
  }
}

template <int VECTOR>
__device__ __forceinline__ void add_row(float* dst, const float (&value)[VECTOR]) {
  constexpr int kStep = VECTOR < 4 ? VECTOR : 4;
#pragma unroll
  for (int i = 0; i < VECTOR; i += kStep) {
    RowVector<float, kStep> x = load_row<float, kStep>(dst + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) x.element[j] += value[i + j];
    *reinterpret_cast<decltype(x.bits)*>(dst + i) = x.bits;
  }
}

__device__ __forceinline__ float weight_at(const void* weights, int64_t at) {
  return weights == nullptr ? 1.f : static_cast<const float*>(weights)[at];
}

/// What lane j of a warp knows of lookup first + j: its row, or -1, and its weight.
struct LaneLookup {
  int row;
  float weight;
};

/// Adds rows of up to kFwdPiece lookups, held by the lanes, in order: sum[i] += weight * src[row * stride + i].
template <typename T, int VECTOR>
__device__ __forceinline__ void add_piece(const T* src, int64_t stride, bool is_inside, const LaneLookup& mine,
                                          int count, float (&sum)[VECTOR]) {
#pragma unroll 1
  for (int first = 0; first < count; first += kFwdInFlight) {
    RowVector<T, VECTOR> row[kFwdInFlight];
#pragma unroll
    for (int k = 0; k < kFwdInFlight; ++k) {
      const int at = __shfl_sync(kFullWarp, mine.row, first + k);
      if (at >= 0 && is_inside) row[k] = load_row<T, VECTOR>(src + at * stride);
    }
#pragma unroll
    for (int k = 0; k < kFwdInFlight; ++k) {
      const int at = __shfl_sync(kFullWarp, mine.row, first + k);
      const float weight = __shfl_sync(kFullWarp, mine.weight, first + k);
      if (at < 0 || !is_inside) continue;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sum[i] = fmaf(weight, static_cast<float>(row[k].element[i]), sum[i]);
    }
  }
}

/// dot[k] = <row[k], other[k]>, all lanes get it; 0 where row[k] is null.
template <typename T, int VECTOR, int COUNT>
__device__ __forceinline__ void dot_rows(const T* const (&row)[COUNT], const T* const (&other)[COUNT], int64_t width,
                                         float (&dot)[COUNT]) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k) dot[k] = 0.f;
#pragma unroll 1
  for (int64_t column = threadIdx.x % 32 * VECTOR; column < width; column += 32 * VECTOR) {
    RowVector<T, VECTOR> x[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      if (row[k] != nullptr) x[k] = load_row<T, VECTOR>(row[k] + column);
    }
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
      if (row[k] == nullptr) continue;
      const RowVector<T, VECTOR> y = load_row<T, VECTOR>(other[k] + column);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        dot[k] = fmaf(static_cast<float>(x[k].element[i]), static_cast<float>(y.element[i]), dot[k]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) dot[k] = warp_sum(dot[k]);
}

/// Grid: (column tile, head, group, token) over warps, or over blocks with kSplit, whose warps take pieces in turn.
template <typename T, int VECTOR, bool kSplit>
__global__ void __launch_bounds__(kBagThreads)
    memory_bag_fwd_kernel(const __grid_constant__ MemoryBagFwdParams p, int64_t num_tasks) {
  __shared__ float smem_sums[kSplit ? kBagWarps : 1][kSplit ? 32 * VECTOR : 1];
  const BagShape& shape = p.shape;
  const int lane_idx = threadIdx.x % 32, warp_idx = threadIdx.x / 32;
  int64_t task = kSplit ? int64_t{blockIdx.x} : int64_t{blockIdx.x} * kBagWarps + warp_idx;
  if (task >= num_tasks) return;
  const int64_t width = shape.width / shape.heads, num_tiles = (width + 32 * VECTOR - 1) / (32 * VECTOR);
  const int64_t in_head = task % num_tiles * 32 * VECTOR + lane_idx * VECTOR;
  task /= num_tiles;
  const int64_t head = task % shape.heads, out_row = task / shape.heads;
  const int64_t token = out_row / shape.out_groups, group = out_row % shape.out_groups;
  const int64_t column = head * width + in_head;
  const bool is_inside = in_head < width;
  const T* src = static_cast<const T*>(p.table) + column;

  float total[VECTOR] = {};
  constexpr int kParts = kSplit ? kBagWarps : 1;
  const int part = kSplit ? warp_idx : 0;
  for (int64_t first = 0; first < shape.lookups; first += kFwdPiece * kParts) {
    const int64_t piece = first + part * kFwdPiece;
    const int count = static_cast<int>(max(min(int64_t{kFwdPiece}, shape.lookups - piece), int64_t{0}));
    LaneLookup mine = {-1, 0.f};
    if (lane_idx < count) {
      const int64_t m = token * shape.lookups + piece + lane_idx;
      const Slot slot = locate(shape.map, shape.indices[m]);
      if (slot.row >= 0 && (shape.out_groups == 1 || slot.group == group)) {
        mine = {static_cast<int>(slot.row), weight_at(p.weights, m * shape.heads + head)};
      }
    }
    float sum[VECTOR] = {};
    add_piece<T, VECTOR>(src, shape.width, is_inside, mine, count, sum);
    if constexpr (kSplit) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) smem_sums[warp_idx][i * 32 + lane_idx] = sum[i];
      __syncthreads();
      if (warp_idx == 0) {
        const int num_pieces =
            static_cast<int>(min((shape.lookups - first + kFwdPiece - 1) / kFwdPiece, int64_t{kParts}));
        for (int other = 0; other < num_pieces; ++other) {
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) total[i] += smem_sums[other][i * 32 + lane_idx];
        }
      }
      __syncthreads();
    } else {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) total[i] += sum[i];
    }
  }
  if (part == 0 && is_inside) store_row(static_cast<T*>(p.out) + out_row * shape.width + column, total);
}

/// Gradient of the weights alone. Grid: (head, kWeightsLookups lookups of a token) over warps.
template <typename T, int VECTOR>
__global__ void __launch_bounds__(kBagThreads)
    memory_bag_bwd_weights_kernel(const __grid_constant__ MemoryBagWeightsParams p, int64_t num_tasks) {
  const BagShape& shape = p.shape;
  const int lane_idx = threadIdx.x % 32;
  int64_t task = int64_t{blockIdx.x} * kBagWarps + threadIdx.x / 32;
  if (task >= num_tasks) return;
  const int64_t head = task % shape.heads, width = shape.width / shape.heads;
  task /= shape.heads;
  const int64_t chunks = (shape.lookups + kWeightsLookups - 1) / kWeightsLookups;
  const int64_t token = task / chunks, first = task % chunks * kWeightsLookups;
  const T *row[kWeightsLookups], *d_out[kWeightsLookups];
  float dot[kWeightsLookups];
#pragma unroll
  for (int k = 0; k < kWeightsLookups; ++k) {
    row[k] = nullptr;
    if (first + k >= shape.lookups) continue;
    const Slot slot = locate(shape.map, shape.indices[token * shape.lookups + first + k]);
    if (slot.row >= 0) row[k] = static_cast<const T*>(p.table) + slot.row * shape.width + head * width;
    d_out[k] = static_cast<const T*>(p.d_out) + shape.out_row(token, slot.group) * shape.width + head * width;
  }
  dot_rows<T, VECTOR>(row, d_out, width, dot);
#pragma unroll
  for (int k = 0; k < kWeightsLookups; ++k) {
    if (lane_idx == 0 && first + k < shape.lookups) {
      static_cast<float*>(p.d_weights)[(token * shape.lookups + first + k) * shape.heads + head] = dot[k];
    }
  }
}

/// Row of the workspace that the piece of a segment of several pieces writes which begins at a position. Pieces that
/// begin segments are at least kPieceLookups apart, and so are the others.
__device__ __forceinline__ float* piece_sums(const MemoryBagBwdParams& p, int64_t position, bool is_first) {
  return static_cast<float*>(p.workspace) + (position / kPieceLookups * 2 + !is_first) * p.shape.width;
}

/// Columns of the sum of segment u to where they belong.
template <typename T, int VECTOR>
__device__ __forceinline__ void write_sum(const MemoryBagBwdParams& p, int64_t u, int64_t column,
                                          const float (&sum)[VECTOR]) {
  const int64_t row = p.kind == RowGradient::kRows ? u : p.rows[u];
  const int64_t at = row * p.d_table_stride + column;
  if (p.kind == RowGradient::kDense) {
    store_row(static_cast<T*>(p.d_table) + at, sum);
  } else if (p.kind == RowGradient::kRows) {
    store_row(static_cast<float*>(p.d_table) + at, sum);
  } else {
    add_row(static_cast<float*>(p.d_table) + at, sum);
  }
}

/// 32 neighbouring sorted positions, one a lane: their lookups, rows of d_out and weights.
struct PositionChunk {
  int first = INT32_MAX;
  int lookup = 0, out_row = 0;
  float weight = 0.f, dot = 0.f;
  bool has_dot = false;

  __device__ __forceinline__ void load(const MemoryBagBwdParams& p, int begin, int end, int head) {
    const BagShape& shape = p.shape;
    const int lane_idx = threadIdx.x % 32;
    first = begin, has_dot = false;
    if (lane_idx >= end - begin) return;
    lookup = p.order[begin + lane_idx];
    const uint32_t token = static_cast<uint32_t>(lookup) / static_cast<uint32_t>(shape.lookups);
    const uint32_t group = shape.out_groups == 1 ? 0 : locate(shape.map, shape.indices[lookup]).group;
    out_row = static_cast<int>(shape.out_row(token, group));
    weight = weight_at(p.weights, lookup * shape.heads + head);
  }
  /// Dot products of the columns so far, to the gradient of the weights.
  __device__ __forceinline__ void flush(const MemoryBagBwdParams& p, int head, bool is_first_tile) {
    if (!has_dot) return;
    float* d_weight = static_cast<float*>(p.d_weights) + lookup * p.shape.heads + head;
    *d_weight = is_first_tile ? dot : *d_weight + dot;
    has_dot = false;
  }
};

/// Grid: (head, kBwdWindow sorted positions) over warps. A lane holds VECTORS vectors of a row; wider heads are walked
/// in tiles of 32 * VECTORS vectors.
template <typename T, int VECTOR, int VECTORS, bool kDots>
__global__ void __launch_bounds__(kBagThreads, VECTORS == 4   ? 4
                                               : VECTORS == 2 ? 5
                                                              : 7)
    memory_bag_bwd_kernel(const __grid_constant__ MemoryBagBwdParams p, int64_t num_tasks) {
  const BagShape& shape = p.shape;
  const int lane_idx = threadIdx.x % 32;
  const int64_t task = int64_t{blockIdx.x} * kBagWarps + threadIdx.x / 32;
  if (task >= num_tasks) return;
  const int head = static_cast<int>(task % shape.heads), width = static_cast<int>(shape.width / shape.heads);
  // Positions are below M < 2^31; sums of them are not formed.
  const int begin = static_cast<int>(task / shape.heads * kBwdWindow);
  const int end = begin + static_cast<int>(min(shape.num_lookups() - begin, int64_t{kBwdWindow}));
  const int num_segments = p.num_rows[1], num_free = p.num_rows[0], num_found = p.starts[num_segments];
  if constexpr (kDots) {
    if (lane_idx < end - begin && begin + lane_idx >= num_found) {
      static_cast<float*>(p.d_weights)[p.order[begin + lane_idx] * shape.heads + head] = 0.f;
    }
  }
  if (begin >= num_found) return;

  PositionChunk chunk;
  int u = warp_upper_bound(p.starts, num_segments, begin) - 1;  // may reach into the window from before
  for (; u < num_segments; ++u) {
    const int start = p.starts[u], stop = p.starts[u + 1];
    if (start >= end) break;
    // The first piece that does not begin before the window.
    constexpr int kPiece = static_cast<int>(kPieceLookups);
    const int into_piece = start < begin ? (begin - start) % kPiece : 0;
    const int to_next = into_piece == 0 ? 0 : kPiece - into_piece;
    const int from = max(start, begin);
    if (to_next >= min(stop, end) - from) continue;
    const int first = from + to_next, last = first + min(kPiece, stop - first);
    const T* table_row = kDots ? static_cast<const T*>(p.table) + p.rows[u] * shape.width : nullptr;

    for (int tile = 0; tile < width; tile += 32 * VECTORS * VECTOR) {
      const int in_head = tile + lane_idx * VECTOR;  // of the lane's first vector; the others follow 32 * VECTOR apart
      const int64_t column = int64_t{head} * width + in_head;
      RowVector<T, VECTOR> value[VECTORS];
      float sum[VECTORS][VECTOR] = {};
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        if (kDots && in_head + v * 32 * VECTOR < width)
          value[v] = load_row<T, VECTOR>(table_row + column + v * 32 * VECTOR);
      }
      for (int i = first; i < last;) {
        if (i < chunk.first || i - chunk.first >= 32) {
          if constexpr (kDots) chunk.flush(p, head, tile == 0);
          chunk.load(p, i, num_found, head);
        }
        const int chunk_end = min(last - chunk.first, 32);
        int at = i - chunk.first;
        for (; at < chunk_end; at += kBwdInFlight) {
          RowVector<T, VECTOR> x[kBwdInFlight][VECTORS];
          float weight[kBwdInFlight];
#pragma unroll
          for (int k = 0; k < kBwdInFlight; ++k) {
            if (at + k >= chunk_end) continue;
            weight[k] = __shfl_sync(kFullWarp, chunk.weight, at + k);
            const int64_t out_row = __shfl_sync(kFullWarp, chunk.out_row, at + k);
            const T* src = static_cast<const T*>(p.d_out) + out_row * shape.width + column;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
              if (in_head + v * 32 * VECTOR < width) x[k][v] = load_row<T, VECTOR>(src + v * 32 * VECTOR);
            }
          }
#pragma unroll
          for (int k = 0; k < kBwdInFlight; ++k) {
            if (at + k >= chunk_end) continue;
            float dot = 0.f;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
              if (in_head + v * 32 * VECTOR >= width) continue;
#pragma unroll
              for (int j = 0; j < VECTOR; ++j) {
                const float g = static_cast<float>(x[k][v].element[j]);
                sum[v][j] = fmaf(weight[k], g, sum[v][j]);
                if constexpr (kDots) dot = fmaf(static_cast<float>(value[v].element[j]), g, dot);
              }
            }
            if constexpr (kDots) {
              dot = warp_sum(dot);
              if (at + k == lane_idx) chunk.dot = dot, chunk.has_dot = true;
            }
          }
        }
        i = chunk.first + chunk_end;
      }
      if constexpr (kDots) chunk.flush(p, head, tile == 0);
      float* piece = stop - start > kPieceLookups ? piece_sums(p, first, first == start) : nullptr;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        if (in_head + v * 32 * VECTOR >= width) continue;
        if (piece != nullptr) {
          store_row(piece + column + v * 32 * VECTOR, sum[v]);
        } else if (u < num_free) {
          write_sum<T, VECTOR>(p, u, column + v * 32 * VECTOR, sum[v]);
        }
      }
    }
  }
}

/// Adds the pieces of a segment of several. Grid: (block of columns, window of kPieceLookups positions); such a segment
/// is the last that begins in its window.
template <typename T>
__global__ void __launch_bounds__(kBagThreads)
    memory_bag_combine_kernel(const __grid_constant__ MemoryBagBwdParams p, int64_t num_column_blocks) {
  const int64_t begin = blockIdx.x / num_column_blocks * kPieceLookups;
  const int64_t column = blockIdx.x % num_column_blocks * kBagThreads + threadIdx.x;
  const int u = warp_upper_bound(p.starts, p.num_rows[1], begin + kPieceLookups - 1) - 1;
  if (u < 0 || u >= p.num_rows[0] || column >= p.shape.width) return;
  const int64_t start = p.starts[u], stop = p.starts[u + 1];
  if (start < begin || stop - start <= kPieceLookups) return;
  float sum[1] = {piece_sums(p, start, true)[column]};
#pragma unroll 8
  for (int64_t first = start + kPieceLookups; first < stop; first += kPieceLookups) {
    sum[0] += piece_sums(p, first, false)[column];
  }
  write_sum<T, 1>(p, u, column, sum);
}

/// Zeros to the rows of d_table that no segment writes. Grid: kZeroWindow rows over warps.
template <typename T, int VECTOR>
__global__ void __launch_bounds__(kBagThreads)
    memory_bag_zero_kernel(const __grid_constant__ MemoryBagBwdParams p, int64_t num_rows) {
  const int64_t begin = (int64_t{blockIdx.x} * kBagWarps + threadIdx.x / 32) * kZeroWindow;
  const bool is_dense = p.kind == RowGradient::kDense;
  const int num_written = p.num_rows[0];
  int u = is_dense ? warp_upper_bound(p.rows, num_written, begin - 1) : num_written;
  for (int64_t row = begin; row < min(begin + kZeroWindow, num_rows); ++row) {
    if (is_dense ? u < num_written && p.rows[u] == row : row < num_written) {
      ++u;
      continue;
    }
    for (int64_t column = threadIdx.x % 32 * VECTOR; column < p.shape.width; column += 32 * VECTOR) {
      const float zero[VECTOR] = {};
      if (is_dense) {
        store_row(static_cast<T*>(p.d_table) + row * p.d_table_stride + column, zero);
      } else {
        store_row(static_cast<float*>(p.d_table) + row * p.d_table_stride + column, zero);
      }
    }
  }
}

}  // namespace remora
