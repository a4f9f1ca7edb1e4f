// State-space modifiers shared by the memory instructions.
#pragma once
#include "sim/decoder.h"

namespace ptxsim {

/// Consumes the state space and notes .shared::cluster in the instruction.
Space take_space(Decode& d);
/// Consumes cache operators, eviction priorities and prefetch sizes: hints.
/// Returns true if a cache-policy operand follows the others.
bool take_cache_hints(Decode& d);
/// Consumes .weak/.relaxed/.acquire/... and the scope; notes strong accesses.
void take_ordering(Decode& d);

}  // namespace ptxsim
