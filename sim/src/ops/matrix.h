#pragma once
#include "ops/fragments.h"
#include "ops/table.h"

namespace ptxsim {
bool parse_mma_type(Type t, MmaType& out);
bool parse_shape(std::string_view s, unsigned& m, unsigned& n, unsigned& k);
/// Records the work of the matrix instruction just emitted.
void note_mma_work(Decode& d, Type t, uint64_t flops);
void register_wmma(OpcodeTable&);
}  // namespace ptxsim
