// The simulated device, chosen by Options::arch.
#pragma once

namespace ptxsim {

struct Device {
  const char* name;
  int major, minor;
  int sms;
  int max_shared_optin;  ///< per block
  int shared_per_sm;
  int max_threads_per_sm;
  int max_blocks_per_sm;
  int l2_bytes;
  int memory_clock_khz, bus_bits, clock_khz;
};

/// Of the selected architecture; throws Error if it is unknown.
const Device& device_properties();

}  // namespace ptxsim
