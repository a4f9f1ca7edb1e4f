#include "recurrence/gated_delta_rule/bwd_kernels.cuh"

namespace remora {
template cudaError_t run_gated_delta_rule_bwd<float, 64>(const GatedDeltaRuleBwdParams&, const BwdWorkspace&,
                                                         const Launch&);
}
