// The kernels of one instruction set, as cpu.cpp calls them. Each does one block of rows on the calling thread.
#pragma once
#include <algorithm>

#include "common/cpu/isa.h"
#include "pkm/sparse_optim/params.h"

namespace remora {

/// Rows of one task. The cut depends on the sizes alone, so the sums do not depend on the number of threads.
constexpr int64_t kSparseBlockRows = 64;

/// U.
inline int64_t num_gradient_rows(const RowGradient& g) {
  if (!g.num_rows) return g.capacity;
  const int64_t count =
      g.num_rows_is_int64 ? *static_cast<const int64_t*>(g.num_rows) : *static_cast<const int32_t*>(g.num_rows);
  return std::clamp<int64_t>(count, 0, g.capacity);
}

struct SparseOptimCpuKernels {
  void (*update)(const SparseUpdateParams&, int64_t block, int64_t num_rows);
  /// Leaves the block's sum of squares in workspace[block].
  void (*sum_of_squares)(const RowNormParams&, int64_t block, int64_t num_rows);
  void (*norm)(const RowNormParams&, int64_t num_blocks);
};

/// The dtype is that of the table, for the norm of the values.
REMORA_CPU_KERNELS(SparseOptimCpuKernels, sparse_optim_kernels)  // defined by cpu_kernels.cpp

}  // namespace remora
