// How fast this machine reads the rows of a bag: every row of a list once, summed, the next ones prefetched; nothing
// else. The bound that a weighted bag is held to. Rows of `lines` cache lines; compiled by bags.py.
#include <stdint.h>

float gather(const float* table, const int64_t* rows, int64_t count, int64_t width) {
  enum { kAhead = 8, kLanes = 16 };
  float sums[kLanes] = {0};
  for (int64_t i = 0; i < count; ++i) {
    const float* row = table + rows[i] * width;
    const float* next = table + rows[i + kAhead < count ? i + kAhead : count - 1] * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      __builtin_prefetch(next + c);
      for (int j = 0; j < kLanes; ++j) sums[j] += row[c + j];
    }
  }
  float sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += sums[j];
  return sum;
}
