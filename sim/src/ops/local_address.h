// Helper instructions that compute addresses only known at run time.
#pragma once
#include "sim/decoder.h"

namespace ptxsim {

/// dst = base of the current activation's local frame.
void emit_local_base(ProgramBuilder& b, const ast::Instruction& source, const Operand& dst);
/// dst = base + disp, truncated to dst's size.
void emit_address(ProgramBuilder& b, const ast::Instruction& source, const Operand& dst, const Operand& base,
                  int64_t disp);

}  // namespace ptxsim
