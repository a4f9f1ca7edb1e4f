// Arguments of the bilinear selection, shared by the CPU and CUDA kernels.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace remora {

/// The k best pairs of candidate rows and columns under S = sum_{r, s} row[r] core[r, s] column[s], in order of S
/// descending, then rank of the row, then rank of the column. Candidates are in two groups, the first `positive` of an
/// axis and the others; pairs are made within a group. row[r] = <query[t, h, 0, r], keys[h, 0, r, index[t, h, 0, i]]>,
/// columns likewise with axis 1; an index outside [0, n) scores zero.
struct TuckerSelectParams {
  DType dtype;             // of query and keys; core and scores are float32, or float64 if dtype is
  int64_t tokens, heads;   // T, H
  int64_t num_keys, dims;  // n, ds
  int64_t candidates;      // m, 1 ... 1024
  int64_t positive;        // of them, 1 ... m
  int64_t rank;            // r, 1 ... 8
  int64_t topk;            // k, 1 ... min(num_pairs(), 1024)
  const void* query;       // [T, H, 2, r, ds]
  const void* keys;        // [H, 2, r, n, ds]
  const int32_t* index;    // [T, H, 2, m]
  const void* core;        // [H, r, r]
  int32_t* chosen;         // [T, H, 2, k] index of the rows and columns of the pairs
  void* sub_scores;        // [T, H, 2, r, k] their scores

  constexpr int64_t num_first_pairs() const { return positive * positive; }
  constexpr int64_t num_pairs() const { return num_first_pairs() + (candidates - positive) * (candidates - positive); }
};

/// Ranks of the row and the column of the pair at a position of the order of ranks.
struct TuckerPair {
  int32_t row, column;
};

constexpr TuckerPair tucker_pair(const TuckerSelectParams& p, int64_t position) {
  const bool is_first = position < p.num_first_pairs();
  const int64_t width = is_first ? p.positive : p.candidates - p.positive;
  const int64_t offset = is_first ? 0 : p.positive, i = is_first ? position : position - p.num_first_pairs();
  return {static_cast<int32_t>(offset + i / width), static_cast<int32_t>(offset + i % width)};
}

}  // namespace remora
