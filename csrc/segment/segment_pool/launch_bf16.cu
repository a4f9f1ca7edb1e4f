// Segment pooling of __nv_bfloat16.
#include "segment/segment_pool/launch_impl.cuh"

REMORA_SEGMENT_POOL_INSTANCE(__nv_bfloat16)
