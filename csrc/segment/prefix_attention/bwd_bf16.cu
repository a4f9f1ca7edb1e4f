#include "segment/prefix_attention/bwd_launch.cuh"

namespace remora {
template Error prefix_attention_bwd_of<__nv_bfloat16>(const PrefixAttentionBwdParams&, bool, const Launch&);
}
