#include "segment/prefix_attention/bwd_launch.cuh"

namespace remora {
template Error prefix_attention_bwd_of<float>(const PrefixAttentionBwdParams&, bool, const Launch&);
}
