// Shadow state of one CTA's shared memory, for racecheck and initcheck.
//
// racecheck orders accesses by happens-before: every warp has a vector clock, joined at barriers, mbarriers, and
// atomics. Two accesses of one byte, one of them a write, by warps that are not ordered, are a hazard. Lanes of one
// warp are ordered by warp-level synchronisation (any .sync instruction). A cp.async is ordered before nothing until
// its thread has waited for it. Stores that leave the bytes as they are do no harm in any order; they are a hazard only
// if `strict`. Not checked: lanes that conflict within one instruction, accesses of other CTAs of the cluster, and
// reads of shared memory by wgmma and bulk stores.
#pragma once
#include <cstdint>
#include <string>
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

  /// How an access relates to others of the same bytes.
  enum class Order : uint8_t {
    plain,
    atomic,  ///< does not race with other atomic ones
    strong,  ///< atomic, and orders what its warp did before and does after
    async,   ///< a cp.async: the write is done when the thread has waited for it
  };
  /// One access instruction: `bytes` bytes at host[lane] for the lanes of `mask`, before it is performed. With
  /// `settled`, the caller performs its stores at once and then calls settle.
  void access(Warp& w, AccessKind kind, Order order, uint32_t mask, uint8_t* const* host, uint64_t bytes,
              bool settled = false);
  void settle(Warp& w) {
    if (!suspects_.empty()) [[unlikely]]
      check_suspects(w);
  }
  void commit_group(Warp& w);
  void wait_group(Warp& w, uint32_t keep);
  void wait_all(Warp& w);

 private:
  using Clock = std::vector<uint32_t>;
  /// What one instruction did; cells hold the number of their last ones.
  struct Event {
    uint32_t clock = 0;  ///< of its warp; kPending until waited for
    uint32_t epoch = 0;  ///< Warp::sync_epoch
    uint32_t pc = 0;
    uint32_t also = 0;  ///< an earlier event that wrote the same bytes, unordered
    uint16_t warp = 0;
    uint8_t chain = 0;  ///< how many follow through `also`
    bool atomic = false;
  };
  /// A cell's record of an event: event << kLaneBits | lane. 0: none.
  using Record = uint32_t;
  struct Suspect {  ///< a store that is a hazard if it changes the bytes
    uint32_t offset, size, old;
    const char* hazard;
    Record before;
    uint32_t lane;
  };
  struct AsyncEvent {  ///< a cp.async not waited for by all its lanes
    uint32_t event, lanes;
    uint32_t group[kWarpSize];
  };
  struct AsyncState {
    uint32_t committed[kWarpSize] = {};
    std::vector<AsyncEvent> pending;
  };

  static void join(Clock& into, const Clock& from);
  bool event_ordered(const Warp& w, uint32_t lane, const Event& e, uint32_t before_lane) const;
  bool read_ordered(const Warp& w, uint32_t lane, Record write) const;
  bool write_ordered(const Warp& w, uint32_t lane, Record write) const;
  bool ordered_for_all_lanes(const Warp& w, const Event& e) const;
  void learn_write(const Warp& w, Record write);
  void learn_read(const Warp& w, uint32_t reader, Record read);
  void link(uint32_t before);
  [[noreturn]] void report(const Warp& w, uint32_t lane, const char* hazard, Record before, uint64_t offset) const;
  void check_suspects(Warp& w);
  void check_initialised(Warp& w, AccessKind kind, uint32_t lane, uint64_t offset, uint64_t bytes);
  void begin_event(Warp& w, Order order);
  void complete(Warp& w, uint32_t lanes, uint32_t keep);
  void read_lane(Warp& w, uint32_t lane, uint64_t offset, uint64_t bytes);
  void write_lane(Warp& w, uint32_t lane, uint64_t offset, uint64_t bytes, bool update);
  void read_cell(Warp& w, uint32_t lane, uint32_t cell, uint64_t offset);
  void write_cell(Warp& w, uint32_t lane, uint32_t cell, uint64_t offset, uint32_t size, bool update);
  bool may_write_4(const Warp& w, uint32_t word);
  uint32_t split(uint32_t word);
  void collect();

  Cta& cta_;
  bool race_, init_, strict_;
  uint32_t warps_;
  std::vector<Clock> clock_;                                ///< per warp
  std::vector<Clock> barrier_clock_;                        ///< per named barrier
  std::unordered_map<const uint8_t*, Clock> object_clock_;  ///< per mbarrier or atomic word
  std::vector<uint8_t> written_;                            ///< per byte

  // A cell is a word of 4 bytes. A word that is accessed by parts has four more cells, behind the words'.
  std::vector<Event> events_;
  std::vector<uint32_t> split_;            ///< per word: its first byte cell, or 0
  std::vector<Record> write_;              ///< per cell
  std::vector<uint32_t> readers_;          ///< per cell: warps that have read it since the last write
  std::vector<std::vector<Record>> read_;  ///< per warp and cell
  std::vector<AsyncState> async_;          ///< per warp
  std::vector<Suspect> suspects_;
  uint32_t first_ = 0, event_ = 0;         ///< of the present instruction, the first and the last
  bool atomic_ = false, settled_ = false;  ///< of the present instruction
  std::vector<uint32_t> epoch_of_;         ///< per warp: sync_epoch at its last event
  std::vector<uint32_t> epoch_start_;      ///< per warp: its first event in that epoch
  // Events found to be ordered before a warp stay so; remembering the last one answers most questions.
  std::vector<uint32_t> known_write_;              ///< per warp
  std::vector<std::vector<uint32_t>> known_read_;  ///< per warp and reading warp
};

}  // namespace ptxsim
