// The k greatest of many scores, in order. Scores are compared as integers of the same order, so that every score, NaN
// and infinities included, has its place: NaN first, -0 and +0 together, equal scores by position.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/cpu/arena.h"
#include "common/cpu/simd.h"

namespace remora::REMORA_CPU_ISA {

template <class T>
using Key = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T>
constexpr Key<T> kGreatestKey = std::numeric_limits<Key<T>>::max();

/// Below the key of every score.
template <class T>
constexpr Key<T> kNoKey = std::numeric_limits<Key<T>>::min();

template <class T>
REMORA_INLINE Vec<Key<T>> keys_of(Vec<T> scores) {
  scores += T{0};  // -0 becomes +0
  const Vec<Key<T>> bits = reinterpret_cast<Vec<Key<T>>>(scores);
  const Vec<Key<T>> ordered = bits ^ ((bits >> (8 * sizeof(T) - 1)) & kGreatestKey<T>);
  return scores == scores ? ordered : broadcast(kGreatestKey<T>);
}

template <class T>
REMORA_INLINE Key<T> key_of(T score) {
  return keys_of<T>(broadcast(score))[0];
}

template <class T>
REMORA_INLINE T score_of(Key<T> key) {
  const Key<T> bits = key ^ ((key >> (8 * sizeof(T) - 1)) & kGreatestKey<T>);
  T score;
  __builtin_memcpy(&score, &bits, sizeof score);
  return score;
}

/// Greatest scores in order: their keys and positions.
template <class T>
struct Ranking {
  Key<T>* keys;
  int32_t* positions;

  static Ranking take(Arena& arena, int64_t count) {
    return {arena.take<Key<T>>(count + kWidth<T>), arena.take<int32_t>(count + kWidth<T>)};
  }
  Ranking operator+(int64_t offset) const { return {keys + offset, positions + offset}; }
};

/// Finds rankings of up to `max_count` keys.
template <class T>
class Selector {
 public:
  Selector(Arena& arena, int64_t max_count, int64_t max_k)
      : passed_(Ranking<T>::take(arena, max_count + kWidth<T>)),
        maxima_(arena.take<Key<T>>(2 * max_k + kWidth<T>)),
        ranks_(arena.take<Key<T>>(kMaxCounted + kWidth<T>)),
        entries_(arena.take<Entry>(max_count + kWidth<T>)) {}

  /// The k greatest of `count` >= k keys, filled up to whole vectors with kNoKey. `best` has room for k + 1.
  void operator()(const Key<T>* keys, int64_t count, int64_t k, Ranking<T> best) const {
    constexpr int w = kWidth<T>;
    const int64_t num_vectors = (count + w - 1) / w;
    const Vec<Key<T>> bound = broadcast(lower_bound(keys, num_vectors, k));
    int64_t passed = 0;
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Vec<Key<T>> x = load<Key<T>>(keys + v * w);
      passed += compress(passed_.keys + passed, passed_.positions + passed, x, static_cast<int32_t>(v * w),
                         mask_bits(x >= bound));
    }
    if (passed <= kMaxCounted) {
      order_by_counting(passed, k, best);
    } else {
      order_by_sorting(passed, k, best);
    }
  }

 private:
  using K = Key<T>;
  struct Entry {
    K key;
    int32_t position;
    bool operator<(const Entry& other) const { return key != other.key ? key > other.key : position < other.position; }
  };
  static constexpr int64_t kMaxCounted = 256;
  static constexpr Vec<K> kLanes = []<int... I>(std::integer_sequence<int, I...>) {
    return Vec<K>{I...};
  }(std::make_integer_sequence<int, kWidth<T>>{});

  static int64_t count_at_least(const K* keys, int64_t num_vectors, K bound) {
    Vec<K> count{};
    for (int64_t v = 0; v < num_vectors; ++v) count -= load<K>(keys + v * kWidth<T>) >= bound;
    return sum<K>(count);
  }

  static K middle(K low, K high) {
    const T a = score_of<T>(low), b = score_of<T>(high);
    const K by_value = key_of<T>(a / 2 + b / 2);
    // Infinities and NaN, and neighbours: halve the interval of keys.
    return low < by_value && by_value < high
               ? by_value
               : low +
                     static_cast<K>(
                         (static_cast<std::make_unsigned_t<K>>(high) - static_cast<std::make_unsigned_t<K>>(low)) / 2);
  }

  /// A key that k keys at least reach, and on the whole few more: about the k-th largest among the maxima of 2 k
  /// groups.
  K lower_bound(const K* keys, int64_t num_vectors, int64_t k) const {
    constexpr int w = kWidth<T>;
    const int64_t groups = (2 * k + w - 1) / w;
    if (num_vectors < groups + groups / 2) return kNoKey<T>;
    for (int64_t g = 0; g < groups; ++g) {
      Vec<K> greatest = load<K>(keys + g * w);
      for (int64_t v = g + groups; v < num_vectors; v += groups) {
        const Vec<K> x = load<K>(keys + v * w);
        greatest = x > greatest ? x : greatest;
      }
      store<K>(maxima_ + g * w, greatest);
    }
    Vec<K> lows = load<K>(maxima_), highs = lows;
    for (int64_t g = 1; g < groups; ++g) {
      const Vec<K> x = load<K>(maxima_ + g * w);
      lows = x < lows ? x : lows, highs = x > highs ? x : highs;
    }
    K low = lows[0], high = highs[0];
    for (int i = 1; i < w; ++i) low = std::min(low, lows[i]), high = std::max(high, highs[i]);
    const int64_t enough = k + k / 8;
    for (int64_t count = groups * w; count > enough && low < high;) {
      const K next = std::max(middle(low, high), low + 1);
      const int64_t reached = count_at_least(maxima_, groups, next);
      if (reached >= k) {
        low = next, count = reached;
      } else {
        high = next - 1;
      }
    }
    return low;
  }

  /// The place of a key is the number of keys before it.
  void order_by_counting(int64_t passed, int64_t k, Ranking<T> best) const {
    constexpr int w = kWidth<T>;
    store<K>(passed_.keys + passed, broadcast(kNoKey<T>));
    for (int64_t i = 0; i < passed; i += w) {
      const Vec<K> x = load<K>(passed_.keys + i);
      Vec<K> places{};
      for (int64_t j = 0; j < i; ++j) places -= x <= passed_.keys[j];
      for (int64_t j = i; j < std::min(i + w, passed); ++j) {
        places -= (x < passed_.keys[j]) | ((x == passed_.keys[j]) & (kLanes > static_cast<K>(j - i)));
      }
      for (int64_t j = i + w; j < passed; ++j) places -= x < passed_.keys[j];
      store<K>(ranks_ + i, places);
    }
    for (int64_t i = 0; i < passed; ++i) {
      const int64_t place = std::min<int64_t>(ranks_[i], k);
      best.keys[place] = passed_.keys[i], best.positions[place] = passed_.positions[i];
    }
  }

  void order_by_sorting(int64_t passed, int64_t k, Ranking<T> best) const {
    for (int64_t i = 0; i < passed; ++i) entries_[i] = {passed_.keys[i], passed_.positions[i]};
    if (passed > k) std::nth_element(entries_, entries_ + k, entries_ + passed);
    std::sort(entries_, entries_ + k);
    for (int64_t i = 0; i < k; ++i) best.keys[i] = entries_[i].key, best.positions[i] = entries_[i].position;
  }

  Ranking<T> passed_;
  K* maxima_;
  K* ranks_;
  Entry* entries_;
};

}  // namespace remora::REMORA_CPU_ISA
