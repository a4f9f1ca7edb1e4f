#include "ops/table.h"

namespace ptxsim {

DecodeFn find_opcode(std::string_view base) {
  static const OpcodeTable table = [] {
    OpcodeTable t;
    register_integer(t);
    register_logic(t);
    register_arithmetic(t);
    register_compare(t);
    register_convert(t);
    register_move(t);
    register_load_store(t);
    register_atomics(t);
    register_control(t);
    register_barriers(t);
    register_warp_sync(t);
    register_async_copy(t);
    register_matrix(t);
    register_mbarrier(t);
    register_bulk_copy(t);
    register_wgmma(t);
    register_cluster(t);
    return t;
  }();
  auto it = table.find(base);
  return it == table.end() ? nullptr : it->second;
}

}  // namespace ptxsim
