// Address spaces and the one path every lane-wise memory access takes.
//
// Device memory is host memory, so a global address is a host pointer. Shared
// and local memory are windows far above any host pointer:
//   shared, generic: kSharedWindow | rank << 24 | offset   (rank: CTA of the cluster)
//   shared, 32-bit:                  rank << 24 | offset
//   local,  generic: kLocalWindow | offset                 (own lane)
#pragma once
#include <cstdint>

#include "sim/warp.h"

namespace ptxsim {

constexpr uint64_t kSharedWindow = 1ull << 56;
constexpr uint64_t kLocalWindow = 1ull << 57;
constexpr unsigned kSharedRankShift = 24;
constexpr uint64_t kHostLimit = 1ull << 47;     ///< user-space pointers are below
constexpr uint64_t kFunctionBase = 1ull << 58;  ///< addresses of device functions

inline bool in_shared_window(uint64_t a) { return a >> 56 == 1; }
inline bool in_local_window(uint64_t a) { return a >> 57 == 1; }

enum class AccessKind : uint8_t { load, store, atomic };

struct LaneAddresses {
  uint64_t addr[kWarpSize];  ///< as the program computed them
  uint8_t* host[kWarpSize];  ///< valid for the lanes in Warp::exec
};

/// Computes base + displacement for every lane, checks alignment and bounds of
/// shared and local accesses, tells the observers, and yields host pointers.
void lane_addresses(Warp& w, const Inst& in, const Operand& base, AccessKind kind, LaneAddresses& out);

/// base + displacement for every lane, unchecked.
void effective_addresses(const Warp& w, const Inst& in, const Operand& base, uint64_t* addr);

/// Host pointer of `bytes` bytes at one address. `space` generic decides by window.
uint8_t* resolve(Warp& w, Space space, uint64_t addr, uint64_t bytes, uint32_t lane, bool cluster);

/// The space a generic address lies in.
Space window_of(uint64_t generic);

/// Throws Error naming the instruction, block and thread.
[[noreturn]] void fault(const Warp& w, uint32_t lane, const std::string& what);

}  // namespace ptxsim
