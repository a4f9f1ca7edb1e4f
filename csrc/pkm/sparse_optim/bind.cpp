// Torch side of the sparse optimizers: check, fill the params, launch. Compiled once per backend.
#include <cmath>

#include "pkm/sparse_optim/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

bool is_integer(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long;
}

RowGradient row_gradient(const Tensor& values, const OptionalTensor& num_rows, Allocations& allocations) {
  STD_TORCH_CHECK(values.dim() == 2 && values.is_contiguous(), "values must be contiguous [C, d]");
  STD_TORCH_CHECK(!num_rows.has_value() || (num_rows->numel() == 1 && is_integer(*num_rows)),
                  "num_rows must be one int32 or int64");
  allocations.input(values, "values"), allocations.input(num_rows, "num_rows");
  return {.dtype = dtype_of(values, "values"),
          .capacity = values.size(0),
          .dim = values.size(1),
          .values = data_or_null(values),
          .num_rows = data_or_null(num_rows),
          .num_rows_is_int64 = num_rows.has_value() && num_rows->scalar_type() == ScalarType::Long};
}

/// Second moments [N, d] make Adam, [N] the row-wise rules; without first moments it is Adagrad.
SparseRule rule_of(const OptionalTensor& moment, const Tensor& second) {
  if (second.dim() == 2) return SparseRule::kAdam;
  return moment.has_value() ? SparseRule::kRowwiseAdam : SparseRule::kRowwiseAdagrad;
}

void update_(const Tensor& table, const OptionalTensor& moment, const Tensor& second, const OptionalTensor& last_step,
             const OptionalTensor& row_log_decay, const Tensor& rows, const Tensor& values,
             const OptionalTensor& num_rows, const OptionalTensor& grad_scale, bool all_rows, double lr, double beta1,
             double beta2, double eps, double weight_decay, double log_decay, int64_t step, bool stochastic_rounding,
             int64_t seed, int64_t column_offset) {
  const DeviceScope device(table);
  Allocations allocations;
  SparseUpdateParams params{};
  STD_TORCH_CHECK(table.dim() == 2 && table.is_contiguous(), "table must be contiguous [N, d]");
  params.dtype = dtype_of(table, "table"), params.num_slots = table.size(0);
  params.gradient = row_gradient(values, num_rows, allocations);
  const int64_t dim = table.size(1);
  const ScalarType state = scalar_type_of(params.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  STD_TORCH_CHECK(params.gradient.dim == dim, "values must be [C, d]");
  STD_TORCH_CHECK(params.gradient.dtype == params.dtype ||
                      (params.gradient.dtype == DType::kFloat32 && params.dtype != DType::kFloat64),
                  "values must have the dtype of table or float32");
  STD_TORCH_CHECK(is_integer(rows), "rows must be int32 or int64");
  check_dense(rows, "rows", {params.gradient.capacity}, rows.scalar_type());
  check_dense(moment, "moment", {params.num_slots, dim}, state);
  params.rule = rule_of(moment, second);
  if (params.rule == SparseRule::kAdam) {
    STD_TORCH_CHECK(moment.has_value(), "second moments [N, d] need first moments");
    check_dense(second, "second", {params.num_slots, dim}, state);
  } else {
    check_dense(second, "second", {params.num_slots}, state);
  }
  STD_TORCH_CHECK(last_step.has_value() == row_log_decay.has_value() && !(all_rows && last_step.has_value()),
                  "catching up needs last_step and row_log_decay, and not all rows");
  check_dense(last_step, "last_step", {params.num_slots}, ScalarType::Int);
  check_dense(row_log_decay, "row_log_decay", {params.num_slots}, ScalarType::Double);
  STD_TORCH_CHECK(
      !grad_scale.has_value() || (grad_scale->numel() == 1 && grad_scale->scalar_type() == ScalarType::Float),
      "grad_scale must be one float32");
  STD_TORCH_CHECK(step >= 1 && step <= INT32_MAX, "step must be in 1...2^31 - 1");
  STD_TORCH_CHECK(!stochastic_rounding || (params.dtype == DType::kBFloat16 && column_offset % 4 == 0),
                  "stochastic rounding needs a bfloat16 table and a column_offset that is a multiple of 4");
  if (table.numel() == 0 || (!all_rows && params.gradient.capacity == 0)) return;

  const bool is_adagrad = params.rule == SparseRule::kRowwiseAdagrad;
  params.mode = all_rows ? SparseMode::kDense : last_step.has_value() ? SparseMode::kCatchUp : SparseMode::kLazy;
  params.stochastic_rounding = stochastic_rounding, params.seed = static_cast<uint64_t>(seed);
  params.column_offset = column_offset, params.step = step;
  params.rows = data_or_null(rows), params.rows_are_int64 = rows.scalar_type() == ScalarType::Long;
  params.grad_scale = static_cast<const float*>(data_or_null(grad_scale));
  params.table = table.mutable_data_ptr(), params.second = second.mutable_data_ptr();
  params.moment = moment.has_value() ? moment->mutable_data_ptr() : nullptr;
  params.last_step = last_step.has_value() ? static_cast<int32_t*>(last_step->mutable_data_ptr()) : nullptr;
  params.row_log_decay = row_log_decay.has_value() ? static_cast<double*>(row_log_decay->mutable_data_ptr()) : nullptr;
  params.beta1 = beta1, params.beta2 = beta2, params.eps = eps;
  params.step_size = is_adagrad ? lr : lr / (1 - std::pow(beta1, step));
  params.second_scale = is_adagrad ? 1 : 1 / std::sqrt(1 - std::pow(beta2, step));
  params.decay = 1 - lr * weight_decay, params.log_decay = log_decay;
  allocations.input(table, "table"), allocations.input(moment, "moment"), allocations.input(second, "second");
  allocations.input(last_step, "last_step"), allocations.input(row_log_decay, "row_log_decay");
  allocations.input(rows, "rows"), allocations.input(grad_scale, "grad_scale");
  check_launch(sparse_update(params, launch_on(table)));
}

Tensor norm(const Tensor& values, const OptionalTensor& num_rows) {
  const DeviceScope device(values);
  Allocations allocations;
  RowNormParams params{};
  params.gradient = row_gradient(values, num_rows, allocations);
  const bool is_double = params.gradient.dtype == DType::kFloat64;
  Tensor result = new_tensor(values, {}, is_double ? ScalarType::Double : ScalarType::Float);
  if (values.numel() == 0) return torch::stable::zero_(result);
  const Tensor workspace = new_workspace(values, row_norm_workspace(params));
  params.norm = result.mutable_data_ptr(), params.workspace = data_or_null(workspace);
  allocations.output(result, "norm"), allocations.output(workspace, "workspace");
  check_launch(row_norm(params, launch_on(values)));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("sparse_update_", TORCH_BOX(&update_));
  m.impl("row_norm", TORCH_BOX(&norm));
}

}  // namespace remora
