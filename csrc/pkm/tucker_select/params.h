// Arguments of the bilinear selection, shared by the CPU and CUDA kernels.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace remora {

/// The k best pairs of candidate rows and columns under S = sum_{r, s} row[r] core[r, s] column[s], in order of S
/// descending, then rank of the row, then rank of the column. Candidates are in two groups, the first `positive` of an
/// axis and the others; pairs are made within a group.
struct TuckerSelectParams {
  DType dtype;             // float32 or float64, of all
  int64_t tokens, heads;   // T, H
  int64_t candidates;      // m, 1 ... 1024
  int64_t positive;        // of them, 1 ... m
  int64_t rank;            // r, 1 ... 8
  int64_t topk;            // k, 1 ... min(num_pairs(), 1024)
  const void* sub_scores;  // [T, H, 2, r, m]
  const void* core;        // [H, r, r]
  int32_t* pairs;          // [T, H, k] row rank * m + column rank

  constexpr int64_t num_first_pairs() const { return positive * positive; }
  constexpr int64_t num_pairs() const { return num_first_pairs() + (candidates - positive) * (candidates - positive); }
};

/// The pair at a position of the order of ranks.
constexpr int32_t tucker_pair(const TuckerSelectParams& p, int64_t position) {
  const bool is_first = position < p.num_first_pairs();
  const int64_t width = is_first ? p.positive : p.candidates - p.positive;
  const int64_t offset = is_first ? 0 : p.positive, i = is_first ? position : position - p.num_first_pairs();
  return static_cast<int32_t>((offset + i / width) * p.candidates + offset + i % width);
}

}  // namespace remora
