// Convergence of a warp's lanes at .sync instructions.
#pragma once
#include "sim/warp.h"

namespace ptxsim {

/// For instructions with a member mask: true when all its live lanes execute
/// the instruction; otherwise the instruction waits and runs again later.
bool members_present(Warp& w, const Operand& members);
/// For .sync.aligned instructions: the same for the whole warp.
bool warp_converged(Warp& w);

}  // namespace ptxsim
