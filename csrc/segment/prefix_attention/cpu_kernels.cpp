// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include "segment/prefix_attention/cpu_bwd.h"
#include "segment/prefix_attention/cpu_fwd.h"

namespace remora::REMORA_CPU_ISA {
namespace {

template <class Op, class E>
constexpr PrefixAttentionCpuKernels kKernels = {
    fwd_scratch<Op, E>, fwd<Op, E>,         bwd_tokens<Op, E>, bwd_sink<Op>,
    bwd_scratch<Op, E>, bwd_queries<Op, E>, bwd_keys<Op, E>,   bwd_sequence<Op, E>,
};

}  // namespace

const PrefixAttentionCpuKernels& prefix_attention_kernels([[maybe_unused]] DType dtype) {
#if defined(__AVX512BF16__)
  return kKernels<DotBFloat16, BFloat16>;
#else
  switch (dtype) {
    case DType::kFloat64:
      return kKernels<Multiply<double>, double>;
    case DType::kBFloat16:
      return kKernels<Multiply<float>, BFloat16>;
    case DType::kFloat16:
      return kKernels<Multiply<float>, Float16>;
    default:
      return kKernels<Multiply<float>, float>;
  }
#endif
}

}  // namespace remora::REMORA_CPU_ISA
