// Hands blocks of rows to threads.
#include "pkm/sparse_optim/cpu.h"

#include "pkm/sparse_optim/launch.h"

namespace remora {
namespace {

/// Below this many elements a second thread costs more than it saves.
constexpr int64_t kMinWorkPerThread = 1 << 14;

int64_t num_blocks(int64_t rows) { return (rows + kSparseBlockRows - 1) / kSparseBlockRows; }
int64_t grain(int64_t dim) {
  return std::max<int64_t>(1, kMinWorkPerThread / (kSparseBlockRows * std::max<int64_t>(1, dim)));
}

}  // namespace

Error sparse_update(const SparseUpdateParams& params, const Launch& launch) {
  const int64_t num_rows = num_gradient_rows(params.gradient);
  const int64_t blocks = num_blocks(params.mode == SparseMode::kDense ? params.num_slots : num_rows);
  const SparseOptimCpuKernels& kernels = sparse_optim_kernels(params.dtype);
  launch.parallel_for(blocks, grain(params.dim()), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) kernels.update(params, block, num_rows);
  });
  return nullptr;
}

int64_t row_norm_workspace(const RowNormParams& params) { return num_blocks(params.gradient.capacity) * 8; }

Error row_norm(const RowNormParams& params, const Launch& launch) {
  const int64_t num_rows = num_gradient_rows(params.gradient), blocks = num_blocks(num_rows);
  const SparseOptimCpuKernels& kernels = sparse_optim_kernels(params.gradient.dtype);
  launch.parallel_for(blocks, grain(params.gradient.dim), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) kernels.sum_of_squares(params, block, num_rows);
  });
  kernels.norm(params, blocks);
  return nullptr;
}

}  // namespace remora
