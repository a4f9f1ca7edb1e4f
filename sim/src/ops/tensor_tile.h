// The box of elements a tensor copy moves between global and shared memory.
#pragma once
#include <cstdint>
#include <functional>

#include "runtime/tensor_map.h"
#include "sim/warp.h"

namespace ptxsim {

/// XORs the 16-byte chunk index of a shared address with the row, as TMA and
/// wgmma do: bits [4, 4+n) ^= bits [7, 7+n) for the 32-, 64- and 128-byte modes.
inline uint32_t swizzle_address(uint32_t a, Swizzle s) {
  switch (s) {
    case Swizzle::b32:
      return a ^ (a >> 3 & 0x10);
    case Swizzle::b64:
      return a ^ (a >> 3 & 0x30);
    case Swizzle::b128:
      return a ^ (a >> 3 & 0x70);
    default:
      return a;
  }
}

enum class BulkReduction : uint8_t { none, add, min, max, inc, dec, and_, or_, xor_ };

/// Bytes of a box in shared memory.
uint32_t tile_bytes(const TensorMap& m);
/// Calls f(address, bytes) for each run of global bytes inside the tensor that the box covers.
void for_tile_rows(const TensorMap& m, const int32_t* coordinates, const std::function<void(uint64_t, uint64_t)>& f);
/// Global -> shared. `shared` is the CTA's memory, `offset` the tile's place in it.
void load_tile(const TensorMap& m, const int32_t* coordinates, uint8_t* shared, uint32_t offset);
/// Shared -> global; elements outside the tensor are dropped.
void store_tile(const TensorMap& m, const int32_t* coordinates, const uint8_t* shared, uint32_t offset,
                BulkReduction op);
/// One element of a bulk reduction.
void reduce_element(uint8_t* to, const uint8_t* from, Type t, BulkReduction op);

}  // namespace ptxsim
