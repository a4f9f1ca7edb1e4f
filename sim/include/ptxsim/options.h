// Options of the simulator. Each has an environment variable of the same name, PTXSIM_<NAME IN CAPITALS>, read when the
// process first uses an option.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace ptxsim {

/// When the effects of asynchronous operations (cp.async, TMA, wgmma) happen.
enum class AsyncMode : uint8_t {
  early,  ///< when issued
  late,   ///< when the matching wait completes: exposes a missing wait
};

/// The order in which the scheduler visits the warps of a CTA.
enum class WarpOrder : uint8_t { forward, reverse, random };

/// Which unordered accesses of shared memory are reported.
enum class RaceCheck : uint8_t {
  off,
  on,      ///< except two stores of the same bytes, which end alike in every order
  strict,  ///< those too
};

/// The arithmetic of mma and wgmma with floating-point inputs and f32 sums.
enum class MmaMode : uint8_t {
  fma,       ///< fused multiply-adds in order of k
  hardware,  ///< blocks of products aligned, truncated and summed as tensor cores of the simulated arch do
};

struct Options {
  AsyncMode async = AsyncMode::early;
  WarpOrder warp_order = WarpOrder::forward;
  uint32_t seed = 1;       ///< of WarpOrder::random and of approx_ulp
  uint32_t threads = 0;    ///< host threads, 0 = one per core
  uint32_t quantum = 256;  ///< warp instructions before another warp runs
  bool memcheck = false;
  RaceCheck racecheck = RaceCheck::off;
  bool initcheck = false;
  bool synccheck = false;
  bool memory_stats = false;  ///< sectors, footprint and bank conflicts
  bool stats = false;         ///< print a table per kernel at exit
  MmaMode mma = MmaMode::fma;
  uint32_t approx_ulp = 0;             ///< f32 results of .approx functions move by up to this many ulp
  uint64_t max_warp_instructions = 0;  ///< per warp, 0 = no limit
  uint32_t arch = 90;                  ///< simulated compute capability, major * 10 + minor
  uint32_t num_sms = 0;                ///< multiprocessors of the device, 0 = those of arch

  bool any_checker() const { return memcheck || racecheck != RaceCheck::off || initcheck; }

  /// Sets one option from text; throws Error on an unknown name or value.
  void set(const std::string& name, const std::string& value);
  /// Its value as text that `set` takes.
  std::string get(const std::string& name) const;
  static std::vector<std::string> names();
  static Options from_environment();
};

/// The process-wide options; launches take a copy.
Options& options();

}  // namespace ptxsim
