// Segment pooling of float.
#include "segment/segment_pool/launch_impl.cuh"

REMORA_SEGMENT_POOL_INSTANCE(float)
