// What a launch function needs besides its parameters, and what it returns; the same on every backend.
#pragma once
#include "common/parallel.h"

namespace remora {

struct Launch {
  void* stream = nullptr;              // cudaStream_t
  int num_sms = 0;                     // multiprocessors of the current device
  int arch = 0;                        // its compute capability, major * 10 + minor
  ParallelFor parallel_for = nullptr;  // CPU only
};

/// Null on success, else a message that lives as long as the process.
using Error = const char*;

}  // namespace remora
