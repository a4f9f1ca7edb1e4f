#pragma once
#include "sim/decoder.h"

namespace ptxsim {
/// Falling off the end of a function returns from it.
void emit_implicit_return(ProgramBuilder& b, uint32_t line);
}  // namespace ptxsim
