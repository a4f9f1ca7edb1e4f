// The selective scan for __half.
#include "recurrence/selective_scan/launch_impl.cuh"

REMORA_SELECTIVE_SCAN_INSTANCE(__half)
