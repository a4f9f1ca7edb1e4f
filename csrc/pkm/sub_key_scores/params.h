// Arguments of the scores of chosen sub-keys, shared by the CPU and CUDA kernels. A group is a head and an axis.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "pkm/score.h"

namespace remora {

/// scores[t, g, m] = score(query[t, g], keys[g, index[t, g, m]]), and its gradient. An index outside [0, n) has score
/// zero and no gradient.
struct SubKeyScoresParams {
  DType dtype;                     // of query, keys and their gradients; scores are float32, or float64 if dtype is
  int64_t tokens, groups;          // T, G
  int64_t num_keys, dims, chosen;  // n, ds, m
  ScoreFunction score;             // forward: kDot only
  const void* query;               // [T, G, ds]
  const void* keys;                // [G, n, ds]
  const int32_t* index;            // [T, G, m]

  void* scores;  // [T, G, m]

  const void* d_scores;  // [T, G, m]
  void* d_query;         // [T, G, ds]
  void* d_keys;          // [G, n, ds]
  void* workspace;       // sub_key_scores_workspace() bytes; backward only
};

/// Gradient of a score with respect to the product <q, K> and the squares <q, q>, <K, K>: the gradient of q is
/// product K + 2 query_square q, that of K is product q + 2 key_square K.
template <class T>
struct ScoreGradient {
  T product, query_square, key_square;
};

/// Of d * score, from the product, the squares and |q - K|^2 (kIdw only).
template <class T>
constexpr ScoreGradient<T> score_gradient(const ScoreFunction& f, T d, T product, T query_square, T key_square,
                                          T distance) {
  const T eps = static_cast<T>(f.eps);
  switch (f.kind) {
    case ScoreFunction::Kind::kCosine: {
      const T q = query_square + eps, key = key_square + eps;
      const T slope = d * static_cast<T>(f.tau) / (std::sqrt(q) * std::sqrt(key));
      return {slope, -slope * product / (2 * q), -slope * product / (2 * key)};
    }
    case ScoreFunction::Kind::kIdw: {
      const T slope = d / (eps + distance);
      return {2 * slope, -slope, -slope};
    }
    default:
      return {d, T{0}, T{0}};
  }
}

}  // namespace remora
