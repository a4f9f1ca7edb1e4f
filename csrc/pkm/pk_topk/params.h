// Arguments of the product-key selection, shared by the CPU and CUDA kernels.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "pkm/score.h"

namespace remora {

/// Sub-scores of an axis, the best of them in order, and for kPairs the best sums of a row and a column.
///
/// Order of an axis: score descending, index ascending. Order of pairs: fp32 sum descending, then rank of the row, then
/// rank of the column. NaN is the greatest score, -0 equals +0, and infinity - infinity is -infinity.
struct PkTopkParams {
  enum class Output : int32_t { kPairs, kAxes };

  DType dtype;             // of query and keys, or of sub_scores; scores are float32, or float64 if dtype is
  Output output;           // pairs, or the order of each axis
  int64_t tokens, heads;   // T, H
  int64_t num_keys, dims;  // n, 1 ... 8192; ds
  int64_t topk;            // k, 1 ... 1024; kAxes: unused
  int64_t candidates;      // k1 best of an axis, 1 ... min(n, 1024); kPairs: k1^2 >= k
  int64_t lowest;          // kAxes: so many of the lowest behind them, worst first, k1 + lowest <= n
  ScoreFunction score;     // unused with sub_scores
  const void* query;       // [T, H, 2, ds] or null
  const void* keys;        // [H, 2, n, ds] or null
  const void* sub_scores;  // [T, H, 2, n] instead of both

  void* scores;    // [T, H, k]; kAxes: [T, H, 2, k1 + lowest]
  int32_t* index;  // the same shape: slots row * n + column; kAxes: indices of sub-keys

  void* workspace;  // pk_topk_workspace() bytes
};

/// Gradient of given sub-scores: d_sub_scores is the sum of d_scores over the slots with that row or column, in order
/// of the slots. Slots outside [0, n^2) are dropped.
struct PkSelectBwdParams {
  DType dtype;  // float32 or float64, of all
  int64_t tokens, heads, num_keys, topk;
  const int32_t* slots;  // [T, H, k]
  const void* d_scores;  // [T, H, k]
  void* d_sub_scores;    // [T, H, 2, n]
};

}  // namespace remora
