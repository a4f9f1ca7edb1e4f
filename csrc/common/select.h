// Sizes of a selection by a warp (select.cuh).
#pragma once

namespace remora {

/// Entries a warp needs to select k: what its first bound lets through is at most this, or else it takes k exactly.
constexpr int select_capacity(int k) {
  const int wanted = k <= 128 ? k + k / 4 : k;
  int capacity = 64;
  while (capacity < wanted) capacity *= 2;
  return capacity;
}

}  // namespace remora
