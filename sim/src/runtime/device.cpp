#include "runtime/device.h"

#include "ptxsim/error.h"
#include "ptxsim/options.h"

namespace ptxsim {

const Device& device_properties() {
  static constexpr Device kDevices[] = {
      {"ptxsim T4-like", 7, 5, 40, 64 << 10, 64 << 10, 1024, 16, 4 << 20, 5001000, 256, 1590000},
      {"ptxsim A100-like", 8, 0, 108, 163 << 10, 164 << 10, 2048, 32, 40 << 20, 1215000, 5120, 1410000},
      {"ptxsim A40-like", 8, 6, 84, 99 << 10, 100 << 10, 1536, 16, 6 << 20, 7251000, 384, 1740000},
      {"ptxsim L40-like", 8, 9, 142, 99 << 10, 100 << 10, 1536, 24, 96 << 20, 9001000, 384, 2490000},
      {"ptxsim H100-SXM-like", 9, 0, 132, 227 << 10, 228 << 10, 2048, 32, 50 << 20, 2619000, 5120, 1980000},
      {"ptxsim B200-like", 10, 0, 148, 227 << 10, 228 << 10, 2048, 32, 126 << 20, 3996000, 8192, 1965000},
      {"ptxsim RTX5090-like", 12, 0, 170, 99 << 10, 100 << 10, 1536, 24, 96 << 20, 14001000, 512, 2407000},
  };
  thread_local Device device;
  const int arch = static_cast<int>(options().arch);
  for (const Device& d : kDevices) {
    if (d.major * 10 + d.minor != arch) continue;
    device = d;
    if (options().num_sms) device.sms = static_cast<int>(options().num_sms);
    return device;
  }
  fail("no simulated device for arch ", arch, " (75, 80, 86, 89, 90, 100 or 120)");
}

}  // namespace ptxsim
