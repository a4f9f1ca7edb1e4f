// Storage of the virtual registers of a function. Compilers number thousands of them, each used for a moment; those
// whose lives do not meet share a slot, which keeps a warp's registers in the host's caches.
#pragma once
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "sim/program.h"

namespace ptxsim {

struct RegisterSlot {
  uint32_t offset = 0;  ///< in the frame; ascending in a list of slots
  uint32_t bytes = 0;   ///< for all lanes
  bool shareable = false;
};

/// The code of one function, its operands and its branches (from pc, to pc; any instruction may also fall through).
struct FunctionCode {
  std::span<Inst> code;
  uint32_t first_pc = 0;
  std::span<Operand> operands;  ///< of the program, as Inst::op_index counts
  std::vector<std::pair<uint32_t, uint32_t>> branches;
};

/// Lays the slots out anew from offset `begin` and rewrites operands and guards. Returns the end of the frame.
uint32_t pack_registers(const FunctionCode& f, const std::vector<RegisterSlot>& slots, uint32_t begin);

}  // namespace ptxsim
