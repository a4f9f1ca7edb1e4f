#include "recurrence/gated_delta_rule/bwd_kernels.cuh"

namespace remora {
template cudaError_t run_gated_delta_rule_bwd<__nv_bfloat16, 64>(const GatedDeltaRuleBwdParams&, const BwdWorkspace&,
                                                                 const Launch&);
}
