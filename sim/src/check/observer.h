// The hook through which every memory access passes when a checker or the
// memory counters are on (Launch::observe).
#pragma once
#include "sim/memory.h"

namespace ptxsim {

/// A lane-wise access, before it is performed. `space` is never generic.
void observe(Warp& w, const Inst& in, Space space, AccessKind kind, uint32_t mask, unsigned bytes,
             const LaneAddresses& a);

/// An access of a bulk or tensor copy or of a matrix instruction to a byte range.
void observe_range(Warp& w, Space space, AccessKind kind, uint32_t lane, uint64_t addr, uint8_t* host, uint64_t bytes);

}  // namespace ptxsim
