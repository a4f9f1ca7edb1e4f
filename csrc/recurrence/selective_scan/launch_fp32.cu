// The selective scan for float.
#include "recurrence/selective_scan/launch_impl.cuh"

REMORA_SELECTIVE_SCAN_INSTANCE(float)
