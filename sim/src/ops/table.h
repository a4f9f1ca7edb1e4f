// The opcode table: every family registers its decode functions.
#pragma once
#include <string_view>
#include <unordered_map>

#include "sim/decoder.h"

namespace ptxsim {

using OpcodeTable = std::unordered_map<std::string_view, DecodeFn>;

void register_integer(OpcodeTable&);
void register_logic(OpcodeTable&);
void register_arithmetic(OpcodeTable&);
void register_compare(OpcodeTable&);
void register_convert(OpcodeTable&);
void register_move(OpcodeTable&);
void register_load_store(OpcodeTable&);
void register_atomics(OpcodeTable&);
void register_control(OpcodeTable&);
void register_barriers(OpcodeTable&);
void register_warp_sync(OpcodeTable&);
void register_async_copy(OpcodeTable&);
void register_matrix(OpcodeTable&);
void register_mbarrier(OpcodeTable&);
void register_bulk_copy(OpcodeTable&);
void register_wgmma(OpcodeTable&);
void register_cluster(OpcodeTable&);

}  // namespace ptxsim
