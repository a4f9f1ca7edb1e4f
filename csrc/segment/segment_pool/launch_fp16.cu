// Segment pooling of __half.
#include "segment/segment_pool/launch_impl.cuh"

REMORA_SEGMENT_POOL_INSTANCE(__half)
