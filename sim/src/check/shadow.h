// Shadow state of one CTA's shared memory, for racecheck and initcheck.
//
// racecheck orders accesses by happens-before: every warp has a vector clock,
// joined at barriers, mbarriers, and atomics. Two accesses of one byte, one of
// them a write, by warps that are not ordered, are a hazard. Lanes of one warp
// are ordered by warp-level synchronisation (any .sync instruction).
// Not checked: lanes that conflict within one instruction, accesses of other
// CTAs of the cluster, and reads of shared memory by wgmma and bulk stores.
#pragma once
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "sim/memory.h"

namespace ptxsim {

class SharedShadow {
 public:
  explicit SharedShadow(Cta& cta);

  void barrier_arrived(Warp& w, uint32_t id);
  void barrier_completed(uint32_t id);
  void release(Warp& w, const uint8_t* object);  ///< arrive on an mbarrier, unlock
  void acquire(Warp& w, const uint8_t* object);  ///< successful wait
  void next_instruction() { ++instruction_; }

  /// How an access relates to others of the same bytes.
  enum class Order : uint8_t {
    plain,
    atomic,  ///< does not race with other atomic ones
    strong,  ///< atomic, and orders what its warp did before and does after
  };
  void access(Warp& w, AccessKind kind, Order order, uint32_t lane, const uint8_t* host, uint64_t bytes);

 private:
  using Clock = std::vector<uint32_t>;
  struct Access {
    uint32_t clock = 0;  ///< 0: none
    uint32_t epoch = 0;  ///< Warp::sync_epoch
    uint32_t instruction = 0;
    uint32_t pc = 0;
    uint16_t warp = 0;
    uint8_t lane = 0;
    bool atomic = false;
  };

  static void join(Clock& into, const Clock& from);
  bool ordered(const Warp& w, uint32_t lane, const Access& before) const;
  void report(const Warp& w, uint32_t lane, const char* hazard, const Access& before, uint64_t offset) const;
  void check_race(Warp& w, AccessKind kind, bool atomic, uint32_t lane, uint64_t offset);

  Cta& cta_;
  bool race_, init_;
  uint32_t warps_;
  uint32_t instruction_ = 1;
  std::vector<Clock> clock_;                                ///< per warp
  std::vector<Clock> barrier_clock_;                        ///< per named barrier
  std::unordered_map<const uint8_t*, Clock> object_clock_;  ///< per mbarrier or atomic word
  std::vector<uint8_t> written_;                            ///< per byte
  std::vector<Access> last_write_;                          ///< per byte
  std::vector<Access> last_read_;                           ///< per byte and warp
};

}  // namespace ptxsim
