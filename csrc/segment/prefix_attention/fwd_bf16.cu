#include "segment/prefix_attention/fwd_launch.cuh"

namespace remora {
template Error prefix_attention_fwd_of<__nv_bfloat16>(const PrefixAttentionFwdParams&, bool, const Launch&);
}
