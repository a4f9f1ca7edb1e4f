// Arguments of weighted bags over a table, shared by the CPU and CUDA kernels.
//
// M = T * P lookups; lookup m = token * P + j. Where it reads is decided by SlotMap alone: an index outside
// [0, groups * layer_rows) is no lookup: it reads nothing, adds nothing and gets zero gradients.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace remora {

/// Lookups of a table row that one task sums; longer segments are cut into such pieces, whose sums are added in order.
constexpr int64_t kPieceLookups = 256;

/// Index = group * layer_rows + i reads row (offset + i) mod num_rows.
struct SlotMap {
  int64_t num_rows;    // N < 2^31
  int64_t groups;      // G; G * layer_rows < 2^31
  int64_t layer_rows;  // 0 ... N
  int64_t offset;      // 0 ... N - 1
};

struct Slot {
  int64_t row;  // -1: no lookup
  uint32_t group;
};

constexpr Slot locate(const SlotMap& map, int64_t index) {
  if (index < 0 || index >= map.groups * map.layer_rows) return {-1, 0};
  const uint32_t layer_rows = static_cast<uint32_t>(map.layer_rows);
  const uint32_t group = map.groups == 1 ? 0 : static_cast<uint32_t>(index) / layer_rows;
  const int64_t row = index - int64_t{group} * map.layer_rows + map.offset;
  return {row < map.num_rows ? row : row - map.num_rows, group};
}

struct Indices {
  const void* data;  // [M]
  bool is_int64;     // else int32

  constexpr int64_t operator[](int64_t m) const {
    return is_int64 ? static_cast<const int64_t*>(data)[m] : static_cast<const int32_t*>(data)[m];
  }
};

/// Lookups sorted by row, in order of m within a row; rows that row_mask freezes behind the others, and behind all of
/// them what is no lookup. Segment u holds the lookups order[starts[u]] ... order[starts[u + 1] - 1] of row rows[u].
struct SlotPlanParams {
  SlotMap map;
  int64_t num_lookups;  // M < 2^31
  Indices indices;
  const uint8_t* row_mask;  // [N] or null; 0: frozen

  int32_t* order;     // [M]
  int32_t* rows;      // [R], R = max_rows(); N behind the last segment
  int32_t* starts;    // [R + 1]; the number of lookups behind the last segment
  int32_t* num_rows;  // [2]: segments of rows that are not frozen; segments

  void* workspace;  // slot_plan_workspace() bytes

  constexpr int64_t max_rows() const { return num_lookups < map.num_rows ? num_lookups : map.num_rows; }
  /// Sort key of a lookup; what is no lookup has the largest, last_key().
  constexpr uint32_t key_of(int64_t m) const {
    const int64_t row = locate(map, indices[m]).row;
    if (row < 0) return last_key();
    return static_cast<uint32_t>(row_mask != nullptr && row_mask[row] == 0 ? map.num_rows + row : row);
  }
  constexpr uint32_t last_key() const { return static_cast<uint32_t>(row_mask ? 2 * map.num_rows : map.num_rows); }
  constexpr int num_key_bits() const {
    int bits = 1;
    while (bits < 32 && last_key() >> bits != 0) ++bits;
    return bits;
  }
};

/// What forward and backward share: d columns in `heads` blocks of d / h, each with its own weight of a lookup.
struct BagShape {
  SlotMap map;
  DType dtype;         // of table, out and d_out; weights and their gradients are float32, or float64 if dtype is
  int64_t tokens;      // T
  int64_t lookups;     // P; T * P < 2^31
  int64_t width;       // d
  int64_t heads;       // h, divides d
  int64_t out_groups;  // map.groups, or 1: groups are summed
  Indices indices;     // [T, P]

  constexpr int64_t num_lookups() const { return tokens * lookups; }
  /// Row of out and d_out that a lookup belongs to.
  constexpr int64_t out_row(int64_t token, uint32_t group) const {
    return out_groups == 1 ? token : token * out_groups + group;
  }
};

struct MemoryBagFwdParams {
  BagShape shape;
  const void* table;    // [N, d]
  const void* weights;  // [T, P, h] or null: ones
  void* out;            // [T, out_groups, d]
};

/// Gradient of the weights alone, token by token.
struct MemoryBagWeightsParams {
  BagShape shape;
  const void* table;  // [N, d]
  const void* d_out;  // [T, out_groups, d]
  void* d_weights;    // [T, P, h]
};

/// Where the sum of a row's segment goes.
enum class RowGradient : int32_t {
  kDense,       // d_table[row] = sum, [N, d] of dtype; rows without one become zero
  kRows,        // d_table[u] = sum, [R, d]; zero behind the last segment
  kAccumulate,  // d_table[row] += sum, [N, d]
};

struct MemoryBagBwdParams {
  BagShape shape;
  const void* table;                                // [N, d] or null: no gradient of the weights
  const void* weights;                              // [T, P, h] or null: ones
  const void* d_out;                                // [T, out_groups, d]
  const int32_t *order, *rows, *starts, *num_rows;  // of SlotPlanParams
  int64_t max_rows;                                 // R

  RowGradient kind;
  void* d_table;           // float32 (float64) but for kDense; frozen rows as rows without a segment
  int64_t d_table_stride;  // elements from row to row
  void* d_weights;         // [T, P, h] or null

  void* workspace;  // memory_bag_bwd_workspace() bytes

  constexpr int64_t num_windows() const { return (shape.num_lookups() + kPieceLookups - 1) / kPieceLookups; }
};

enum class Activation : int32_t { kIdentity, kRelu, kGelu, kSilu };

/// Experts of one neuron: row [u | v] of the table answers x with act(<u, x>) v. The bag is over the columns of v.
struct PeerBagFwdParams {
  BagShape shape;       // width dv; out_groups == 1
  int64_t query_width;  // dp
  Activation act;
  const void* table;    // [N, dp + dv]
  const void* x;        // [T, dp]
  const void* weights;  // [T, P, h] or null: ones
  void* out;            // [T, dv]

  constexpr int64_t row_width() const { return query_width + shape.width; }
};

/// Everything of the backward pass but the table: what is summed into a row is factors[m] d_out[t] and d_scores[m]
/// x[t].
struct PeerBagBwdParams {
  BagShape shape;
  int64_t query_width;
  Activation act;
  const void* table;    // [N, dp + dv]
  const void* x;        // [T, dp]
  const void* weights;  // [T, P, h] or null: ones
  const void* d_out;    // [T, dv]

  void* d_x;        // [T, dp]
  void* d_weights;  // [T, P, h] or null
  void* factors;    // [T, P, h] act(score) weight, or null
  void* d_scores;   // [T, P] gradient of <u, x>, or null

  constexpr int64_t row_width() const { return query_width + shape.width; }
};

}  // namespace remora
