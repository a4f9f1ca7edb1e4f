// Which pairs of ranks can be among the k best sums. Rounded addition is monotone, so a pair (row rank, column rank),
// counted from one, comes after the (row rank * column rank - 1) pairs that are no worse in either rank: it is among
// the k best only if the product of its ranks is at most k.
#pragma once
#include <algorithm>
#include <cstdint>

namespace remora {

/// Columns that row `rank`, counted from zero, is combined with.
constexpr int64_t staircase_width(int64_t rank, int64_t topk, int64_t candidates) {
  return std::min(candidates, topk / (rank + 1));
}

constexpr int64_t staircase_rows(int64_t topk, int64_t candidates) { return std::min(topk, candidates); }

/// Pairs in all: about k (log k + 0.154) where candidates do not bound it.
constexpr int64_t staircase_size(int64_t topk, int64_t candidates) {
  int64_t size = 0;
  for (int64_t rank = 0; rank < staircase_rows(topk, candidates); ++rank) {
    size += staircase_width(rank, topk, candidates);
  }
  return size;
}

}  // namespace remora
