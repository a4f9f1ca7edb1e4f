// Arguments of the optimizers on row gradients, shared by the CPU and CUDA kernels.
//
// The gradient of a table [N, d] is compact: values[i] belongs to row rows[i], i < U, and U may live on the device.
// Rows are distinct and ascending. A row outside 0 ... N - 1 is dropped; of equal rows, an arbitrary one may win.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace remora {

enum class SparseRule : int32_t { kAdam, kRowwiseAdam, kRowwiseAdagrad };

/// Which rows an update touches: those with a gradient; those, after the updates without a gradient that they missed;
/// or all, as if the others had a gradient of zero.
enum class SparseMode : int32_t { kLazy, kCatchUp, kDense };

/// values[:U], a gradient in rows.
struct RowGradient {
  DType dtype;         // of values
  int64_t capacity;    // C, the rows of values; U = clamp(*num_rows, 0, C)
  int64_t dim;         // d
  const void* values;  // [C, d]
  const void* num_rows;
  bool num_rows_is_int64;
};

struct SparseUpdateParams {
  SparseRule rule;
  SparseMode mode;
  DType dtype;               // of the table; the gradient has it, or float32; states have float32, float64 if dtype is
  bool stochastic_rounding;  // of a bfloat16 table
  int64_t num_slots;         // N
  RowGradient gradient;
  const void* rows;  // [C]
  bool rows_are_int64;
  const float* grad_scale;  // scalar or null: 1

  void* table;            // [N, d]
  void* moment;           // [N, d] first moment of Adam
  void* second;           // [N, d] second moment of Adam; [N] of the row-wise rules
  int32_t* last_step;     // [N] of kCatchUp: the step of a row's last update
  double* row_log_decay;  // [N] of kCatchUp: log_decay after that update

  // Factors of this step.
  double beta1, beta2;
  double step_size;       // lr / (1 - beta1^step); lr of Adagrad
  double second_scale;    // 1 / sqrt(1 - beta2^step); 1 of Adagrad
  double eps, decay;      // decay = 1 - lr * weight_decay
  double log_decay;       // sum of log(decay) over the steps before this one
  int64_t step;           // from 1
  uint64_t seed;          // of the stochastic rounding
  int64_t column_offset;  // column of the whole table that column 0 is; a multiple of 4
  constexpr int64_t dim() const { return gradient.dim; }
};

struct RowNormParams {
  RowGradient gradient;
  void* norm;       // scalar float32, float64 if the gradient is
  void* workspace;  // row_norm_workspace() bytes
};

}  // namespace remora
