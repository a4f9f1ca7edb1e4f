// Cooperative thread arrays, their barriers, and clusters of them.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "sim/async.h"
#include "sim/launch.h"
#include "sim/warp.h"

namespace ptxsim {

struct Cluster;
struct Worker;
class SharedShadow;
class TrafficCounter;

enum class BarrierReduction : uint8_t { popc, all, any };

/// One of the 16 hardware barriers of a CTA. Arrival is counted in warps, as
/// the hardware does: a warp has arrived when all its live lanes have.
struct NamedBarrier {
  struct Reader {  ///< a waiting bar.red wants the result
    Warp* warp;
    uint32_t lanes, frame;
    Operand dst;
    BarrierReduction kind;
  };
  uint32_t expected_threads = 0;  ///< 0: every live thread of the CTA
  bool in_use = false;
  std::vector<uint32_t> arrived;  ///< lanes, per warp
  std::vector<Reader> readers;
  uint32_t reduction_count = 0;  ///< bar.red: lanes with a true predicate
  uint32_t reduction_lanes = 0;  ///< bar.red: lanes counted
};

struct Cta {
  Launch* launch = nullptr;
  Cluster* cluster = nullptr;
  Worker* worker = nullptr;
  uint32_t rank = 0;  ///< in the cluster
  Dim3 id;
  uint64_t linear_id = 0;
  uint32_t shared_bytes = 0;
  std::vector<uint8_t> shared;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<AsyncQueues>> async;
  NamedBarrier barriers[16];
  std::unique_ptr<SharedShadow> shadow;  ///< racecheck and initcheck state

  Cta();
  ~Cta();
  void start();
  /// One scheduling round: each runnable warp runs a quantum. Returns whether
  /// any warp did more than poll.
  bool round(uint32_t round_number);
  bool done() const;
  bool blocked() const;  ///< no warp can run

  void barrier_arrive(Warp& w, uint32_t id, uint32_t threads, bool wait);
  void barrier_recheck();  ///< lanes exited: barriers may now be complete

 private:
  bool barrier_complete(const NamedBarrier& b) const;
  void barrier_release(uint32_t id);
};

struct Cluster {
  Launch* launch = nullptr;
  Dim3 id;
  std::vector<std::unique_ptr<Cta>> ctas;
  uint64_t barrier_phase = 0;    ///< completed barrier.cluster phases
  uint32_t barrier_arrived = 0;  ///< lanes
  uint64_t strong_accesses = 0;  ///< atomics and strong loads since the last slice
  uint64_t idle_rounds = 0;
  uint64_t mbarrier_updates = 0;  ///< arrivals and completions: progress, for deadlock detection
  MbarrierEvents events;          ///< deferred effects that signal mbarriers

  uint32_t live_lanes() const;
  void barrier_check();
  bool done() const;
  /// Runs for a while; true when every CTA has ended.
  bool slice();
};

/// A host thread that executes clusters.
struct Worker {
  Worker();
  ~Worker();
  LaunchStats stats;
  std::unique_ptr<TrafficCounter> traffic;
};

void note_strong_access(Warp& w);

}  // namespace ptxsim
