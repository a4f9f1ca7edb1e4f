// Integer forms of opcodes shared with floating point.
#pragma once
#include "sim/decoder.h"

namespace ptxsim::integer {
void add(Decode& d);
void sub(Decode& d);
void mul(Decode& d);
void mad(Decode& d);
void div(Decode& d);
void min(Decode& d);
void max(Decode& d);
void abs(Decode& d);
void neg(Decode& d);
}  // namespace ptxsim::integer
