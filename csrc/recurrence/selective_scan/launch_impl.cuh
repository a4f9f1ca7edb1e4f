// Definitions of launch.cuh.
#pragma once
#include <utility>

#include "recurrence/selective_scan/bwd_kernel.cuh"
#include "recurrence/selective_scan/fwd_kernel.cuh"
#include "recurrence/selective_scan/launch.cuh"

namespace remora {

/// One launch after the other, until one fails.
class ScanLauncher {
 public:
  explicit ScanLauncher(const Launch& launch) : stream_(static_cast<cudaStream_t>(launch.stream)) {}

  template <class Kernel, class... Args>
  void operator()(Kernel kernel, int64_t num_ctas, const Args&... args) {
    run(kernel, num_ctas, 0, args...);
  }

  /// With dynamic shared memory.
  template <class Kernel, class... Args>
  void with_smem(Kernel kernel, int64_t num_ctas, int smem_size, const Args&... args) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_size));
    run(kernel, num_ctas, smem_size, args...);
  }

  /// A thread for each of `size`.
  template <class Kernel, class... Args>
  void each(Kernel kernel, int64_t size, const Args&... args) {
    (*this)(kernel, (size + kScanThreads - 1) / kScanThreads, args...);
  }

  Error error() const { return error_; }

 private:
  template <class Kernel, class... Args>
  void run(Kernel kernel, int64_t num_ctas, int smem_size, const Args&... args) {
    if (error_ != nullptr || num_ctas == 0) return;
    if (num_ctas > INT32_MAX) {
      error_ = "selective_scan on CUDA: too many tokens and channels";
      return;
    }
    kernel<<<static_cast<unsigned>(num_ctas), kScanThreads, smem_size, stream_>>>(args...);
    check(cudaGetLastError());
  }
  void check(cudaError_t error) {
    if (error_ == nullptr && error != cudaSuccess) error_ = cudaGetErrorString(error);
  }

  cudaStream_t stream_;
  Error error_ = nullptr;
};

template <typename T>
void clear_uncovered(const SelectiveScanInputs& in, void* data, const ScanStrides& stride, ScanLauncher& launch) {
  constexpr int64_t kClearCtas = 64;
  if (in.cu_seqlens == nullptr || data == nullptr) return;
  launch(selective_scan_clear_kernel<T>, kClearCtas, in, static_cast<T*>(data), stride);
}

template <typename T>
Error selective_scan_fwd_of(const SelectiveScanFwdParams& p, const Launch& where) {
  return with_scan_traits<kWalkStates>(p.in.shape.state_dim, [&](auto traits) {
    using Traits = decltype(traits);
    ScanLauncher launch(where);
    const ScanWorkspace sizes(p.in);
    const int64_t num_channel_blocks = p.in.shape.num_groups * scan_blocks_per_group<Traits::CHANNELS>(p.in.shape);
    ScanSummaries summaries{static_cast<float*>(p.saved_states), static_cast<float*>(p.workspace)};
    if (summaries.states == nullptr) summaries.states = summaries.steps + sizes.steps;
    clear_uncovered<T>(p.in, p.out, p.out_stride, launch);
    if (p.in.cu_seqlens != nullptr || p.in.shape.sequences.seqlen > kScanInterval) {
      launch(selective_scan_summary_kernel<T, Traits>, sizes.slots * num_channel_blocks, p.in, summaries,
             num_channel_blocks);
      launch(selective_scan_combine_kernel, p.in.shape.sequences.num_seqs * ScanStateThread::ctas_per_seq(p.in.shape),
             p, summaries);
    }
    launch(selective_scan_fwd_kernel<T, Traits>, sizes.slots * num_channel_blocks, p,
           static_cast<const float*>(summaries.states), num_channel_blocks);
    return launch.error();
  });
}

template <typename T>
Error selective_scan_bwd_of(const SelectiveScanBwdParams& p, const Launch& where) {
  return with_scan_traits<kWalkStates>(p.in.shape.state_dim, [&](auto traits) {
    using Traits = decltype(traits);
    ScanLauncher launch(where);
    const ScanWorkspace sizes(p.in);
    const int64_t num_walk_blocks = p.in.shape.num_groups * scan_blocks_per_group<Traits::CHANNELS>(p.in.shape);
    const int64_t blocks_per_group = scan_blocks_per_group<kBwdChannels>(p.in.shape);
    const int64_t num_channel_blocks = p.in.shape.num_groups * blocks_per_group;
    const int64_t total_rows = p.in.shape.sequences.batch * p.in.shape.sequences.seqlen;
    ScanGradients gradients{};
    float* next = static_cast<float*>(p.workspace);
    const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
    gradients.states = take(sizes.states), gradients.steps = take(sizes.steps);
    gradients.db = take(sizes.map_shares), gradients.dc = take(sizes.map_shares);
    gradients.da = take(sizes.states), gradients.dskip = take(sizes.steps), gradients.ddelta_bias = take(sizes.steps);

    for (void* const data : {p.du, p.ddelta, p.dz}) clear_uncovered<T>(p.in, data, p.d_stride, launch);
    if (p.in.cu_seqlens != nullptr || p.in.shape.sequences.seqlen > kScanInterval) {
      launch(selective_scan_bwd_summary_kernel<T, Traits>, sizes.slots * num_walk_blocks, p, gradients,
             num_walk_blocks);
    }
    launch(selective_scan_bwd_combine_kernel, p.in.shape.sequences.num_seqs * ScanStateThread::ctas_per_seq(p.in.shape),
           p, gradients);
    launch.with_smem(selective_scan_bwd_kernel<T>, sizes.slots * num_channel_blocks, int{sizeof(ScanBwdSmem)}, p,
                     gradients, num_channel_blocks);
    launch.each(selective_scan_bwd_map_kernel<T>, total_rows * p.in.shape.num_groups * p.in.shape.state_dim, p,
                gradients, blocks_per_group);
    launch.each(selective_scan_bwd_channel_kernel, p.in.shape.num_channels * (p.in.shape.state_dim + 2), p, gradients,
                sizes.slots);
    return launch.error();
  });
}

template <typename T>
Error selective_scan_step_of(const SelectiveScanStepParams& p, const Launch& where) {
  return with_scan_traits<kStepStates>(p.in.shape.state_dim, [&](auto traits) {
    using Traits = decltype(traits);
    ScanLauncher launch(where);
    const int64_t num_channel_blocks = p.in.shape.num_groups * scan_blocks_per_group<Traits::CHANNELS>(p.in.shape);
    launch(selective_scan_step_kernel<T, Traits>, p.in.shape.sequences.num_seqs * num_channel_blocks, p,
           num_channel_blocks);
    return launch.error();
  });
}

}  // namespace remora

#define REMORA_SELECTIVE_SCAN_INSTANCE(T)                                                                \
  template remora::Error remora::selective_scan_fwd_of<T>(const SelectiveScanFwdParams&, const Launch&); \
  template remora::Error remora::selective_scan_bwd_of<T>(const SelectiveScanBwdParams&, const Launch&); \
  template remora::Error remora::selective_scan_step_of<T>(const SelectiveScanStepParams&, const Launch&);
