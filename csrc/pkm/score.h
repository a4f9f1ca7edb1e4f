// Scores of a query half q and a sub-key K, from their product and their squared norms.
#pragma once
#include <cstdint>

namespace remora {

/// kDot     <q, K>
/// kCosine  tau <q, K> / (|q| |K|) with |x| = sqrt(<x, x> + eps)
/// kIdw     -log(eps + |q - K|^2) with |q - K|^2 = max(0, <q, q> + <K, K> - 2 <q, K>)
struct ScoreFunction {
  enum class Kind : int32_t { kDot, kCosine, kIdw };

  Kind kind = Kind::kDot;
  double tau = 1;  // kCosine
  double eps = 0;  // kCosine, kIdw; positive
};

}  // namespace remora
