// The selective scan for __nv_bfloat16.
#include "recurrence/selective_scan/launch_impl.cuh"

REMORA_SELECTIVE_SCAN_INSTANCE(__nv_bfloat16)
