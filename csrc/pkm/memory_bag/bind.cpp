// Torch side of weighted bags: check, allocate, fill the params, launch. Compiled once per backend.
#include <algorithm>
#include <tuple>

#include "pkm/memory_bag/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

SlotMap slot_map(int64_t num_rows, int64_t groups, int64_t layer_rows, int64_t offset) {
  STD_TORCH_CHECK(num_rows >= 0 && num_rows < INT32_MAX, "the table must have fewer than 2^31 - 1 rows");
  STD_TORCH_CHECK(layer_rows >= 0 && layer_rows <= num_rows && groups >= 1 && groups * layer_rows < INT32_MAX &&
                      offset >= 0 && (offset < num_rows || offset == 0),
                  "layer_rows must be in 0...N, offset in 0...N-1, groups * layer_rows below 2^31 - 1");
  return {.num_rows = num_rows, .groups = groups, .layer_rows = layer_rows, .offset = offset};
}

Indices indices_of(const Tensor& indices, Allocations& allocations) {
  STD_TORCH_CHECK(indices.dim() == 2 && indices.is_contiguous(), "indices must be contiguous [T, P]");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long || indices.scalar_type() == ScalarType::Int,
                  "indices must be int32 or int64");
  STD_TORCH_CHECK(indices.numel() < INT32_MAX, "2^31 - 2 lookups are allowed");
  allocations.input(indices, "indices");
  return {.data = data_or_null(indices), .is_int64 = indices.scalar_type() == ScalarType::Long};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plan(const Tensor& indices, int64_t num_rows, int64_t groups,
                                                int64_t layer_rows, int64_t offset, const OptionalTensor& row_mask) {
  const DeviceScope device(indices);
  Allocations allocations;
  SlotPlanParams params{};
  params.map = slot_map(num_rows, groups, layer_rows, offset);
  params.indices = indices_of(indices, allocations);
  params.num_lookups = indices.numel();
  check_dense(row_mask, "row_mask", {num_rows}, ScalarType::Byte);
  allocations.input(row_mask, "row_mask");
  params.row_mask = static_cast<const uint8_t*>(data_or_null(row_mask));
  Tensor order = new_tensor(indices, {params.num_lookups}, ScalarType::Int);
  Tensor rows = new_tensor(indices, {params.max_rows()}, ScalarType::Int);
  Tensor starts = new_tensor(indices, {params.max_rows() + 1}, ScalarType::Int);
  Tensor counts = new_tensor(indices, {2}, ScalarType::Int);
  if (params.num_lookups == 0) return {order, rows, torch::stable::zero_(starts), torch::stable::zero_(counts)};
  params.order = static_cast<int32_t*>(order.mutable_data_ptr()),
  params.rows = static_cast<int32_t*>(data_or_null(rows));
  params.starts = static_cast<int32_t*>(starts.mutable_data_ptr());
  params.num_rows = static_cast<int32_t*>(counts.mutable_data_ptr());
  const Tensor workspace = new_workspace(indices, slot_plan_workspace(params));
  params.workspace = data_or_null(workspace);
  allocations.output(order, "order"), allocations.output(rows, "rows"), allocations.output(starts, "starts");
  allocations.output(counts, "num_rows"), allocations.output(workspace, "workspace");
  check_launch(slot_plan(params, launch_on(indices)));
  return {order, rows, starts, counts};
}

BagShape bag_shape(const Tensor& indices, const Tensor& like, int64_t num_rows, int64_t width, int64_t heads,
                   int64_t groups, int64_t layer_rows, int64_t offset, Allocations& allocations) {
  STD_TORCH_CHECK(heads >= 1 && width % heads == 0 && width < INT32_MAX / 2,
                  "the heads of weights must divide the width of the table, which must be below 2^30");
  BagShape shape{};
  shape.map = slot_map(num_rows, groups, layer_rows, offset);
  shape.dtype = dtype_of(like, "table");
  shape.indices = indices_of(indices, allocations);
  shape.tokens = indices.size(0), shape.lookups = indices.size(1);
  shape.width = width, shape.heads = heads, shape.out_groups = groups;
  STD_TORCH_CHECK(shape.tokens * groups < INT32_MAX, "T * groups must be below 2^31 - 1");
  return shape;
}

void check_weights(const OptionalTensor& weights, const BagShape& shape, ScalarType wide, Allocations& allocations) {
  check_dense(weights, "weights", {shape.tokens, shape.lookups, shape.heads}, wide);
  allocations.input(weights, "weights");
}

int64_t heads_of(const OptionalTensor& weights) {
  STD_TORCH_CHECK(!weights.has_value() || weights->dim() == 3, "weights must be [T, P, h]");
  return weights.has_value() ? weights->size(2) : 1;
}

void check_table(const Tensor& table, Allocations& allocations) {
  STD_TORCH_CHECK(table.dim() == 2 && table.is_contiguous(), "table must be contiguous [N, d]");
  allocations.input(table, "table");
}

Tensor fwd(const Tensor& indices, const Tensor& table, const OptionalTensor& weights, const OptionalTensor&,
           const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
           const OptionalTensor&, const OptionalTensor&, int64_t groups, int64_t layer_rows, int64_t offset) {
  const DeviceScope device(table);
  Allocations allocations;
  check_table(table, allocations);
  MemoryBagFwdParams params{};
  params.shape = bag_shape(indices, table, table.size(0), table.size(1), heads_of(weights), groups, layer_rows, offset,
                           allocations);
  check_weights(weights, params.shape, wide_type(table), allocations);
  Tensor out = new_tensor(table, {indices.size(0), groups, table.size(1)}, table.scalar_type());
  if (out.numel() == 0) return out;
  if (table.numel() == 0 || indices.numel() == 0) return torch::stable::zero_(out);
  params.table = table.const_data_ptr(), params.weights = data_or_null(weights), params.out = out.mutable_data_ptr();
  allocations.output(out, "out");
  check_launch(memory_bag_fwd(params, launch_on(table)));
  return out;
}

void check_d_out(const Tensor& d_out, const BagShape& shape, Allocations& allocations) {
  check_dense(d_out, "d_out", {shape.tokens, shape.out_groups, shape.width}, scalar_type_of(shape.dtype));
  allocations.input(d_out, "d_out");
}

Tensor bwd_weights(const Tensor& indices, const Tensor& table, const Tensor& d_out, int64_t heads, int64_t groups,
                   int64_t layer_rows, int64_t offset) {
  const DeviceScope device(table);
  Allocations allocations;
  check_table(table, allocations);
  MemoryBagWeightsParams params{};
  params.shape =
      bag_shape(indices, table, table.size(0), table.size(1), heads, groups, layer_rows, offset, allocations);
  check_d_out(d_out, params.shape, allocations);
  Tensor d_weights = new_tensor(table, {indices.size(0), indices.size(1), heads}, wide_type(table));
  if (d_weights.numel() == 0) return d_weights;
  if (table.numel() == 0) return torch::stable::zero_(d_weights);
  params.table = table.const_data_ptr(), params.d_out = d_out.const_data_ptr();
  params.d_weights = d_weights.mutable_data_ptr();
  allocations.output(d_weights, "d_weights");
  check_launch(memory_bag_bwd_weights(params, launch_on(table)));
  return d_weights;
}

/// What every sum into rows needs of a plan.
void fill_plan(MemoryBagBwdParams& params, const Tensor& order, const Tensor& rows, const Tensor& starts,
               const Tensor& num_rows, Allocations& allocations) {
  params.max_rows = rows.numel();
  check_dense(order, "order", {params.shape.num_lookups()}, ScalarType::Int);
  check_dense(rows, "rows", {std::min(params.shape.num_lookups(), params.shape.map.num_rows)}, ScalarType::Int);
  check_dense(starts, "starts", {params.max_rows + 1}, ScalarType::Int);
  check_dense(num_rows, "num_rows", {2}, ScalarType::Int);
  params.order = static_cast<const int32_t*>(order.const_data_ptr());
  params.rows = static_cast<const int32_t*>(rows.const_data_ptr());
  params.starts = static_cast<const int32_t*>(starts.const_data_ptr());
  params.num_rows = static_cast<const int32_t*>(num_rows.const_data_ptr());
  allocations.input(order, "order"), allocations.input(rows, "rows"), allocations.input(starts, "starts");
  allocations.input(num_rows, "num_rows");
}

/// The gradient of a table [N, d] like `like`: dense, or the rows of a plan.
Tensor new_d_table(const Tensor& like, int64_t table_rows, int64_t max_rows, int64_t width, bool dense) {
  return dense ? new_tensor(like, {table_rows, width}, like.scalar_type())
               : new_tensor(like, {max_rows, width}, wide_type(like));
}

/// Both forms of the backward pass: d_table is allocated by the caller. Returns d_weights, empty without a table.
Tensor run_bwd(const Tensor& indices, const OptionalTensor& table, const OptionalTensor& weights, const Tensor& d_out,
               const Tensor& order, const Tensor& rows, const Tensor& starts, const Tensor& num_rows, int64_t heads,
               int64_t table_rows, int64_t groups, int64_t layer_rows, int64_t offset, RowGradient kind,
               Tensor d_table) {
  Allocations allocations;
  STD_TORCH_CHECK(!weights.has_value() || heads_of(weights) == heads, "heads must be that of weights");
  MemoryBagBwdParams params{};
  params.shape = bag_shape(indices, d_out, table_rows, d_out.size(2), heads, groups, layer_rows, offset, allocations);
  const BagShape& shape = params.shape;
  const ScalarType wide = wide_type(d_out);
  check_d_out(d_out, shape, allocations);
  check_weights(weights, shape, wide, allocations);
  check_dense(table, "table", {table_rows, shape.width}, d_out.scalar_type());
  fill_plan(params, order, rows, starts, num_rows, allocations);
  Tensor d_weights =
      table.has_value() ? new_tensor(d_out, {shape.tokens, shape.lookups, heads}, wide) : new_tensor(d_out, {0}, wide);
  if (d_table.numel() == 0 || shape.num_lookups() == 0) {
    if (kind != RowGradient::kAccumulate) torch::stable::zero_(d_table);
    return torch::stable::zero_(d_weights);
  }
  params.table = data_or_null(table), params.weights = data_or_null(weights), params.d_out = d_out.const_data_ptr();
  params.kind = kind, params.d_table = d_table.mutable_data_ptr(), params.d_table_stride = shape.width;
  params.d_weights = data_or_null(d_weights);
  const Tensor workspace = new_workspace(d_out, memory_bag_bwd_workspace(params));
  params.workspace = data_or_null(workspace);
  allocations.input(table, "table"), allocations.add(d_table, "d_table", kind == RowGradient::kAccumulate);
  allocations.output(d_weights, "d_weights"), allocations.output(workspace, "workspace");
  check_launch(memory_bag_bwd(params, launch_on(d_out)));
  return d_weights;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& indices, const OptionalTensor& table, const OptionalTensor& weights,
                               const Tensor& d_out, const Tensor& order, const Tensor& rows, const Tensor& starts,
                               const Tensor& num_rows, int64_t heads, int64_t table_rows, int64_t groups,
                               int64_t layer_rows, int64_t offset, bool dense) {
  const DeviceScope device(d_out);
  STD_TORCH_CHECK(d_out.dim() == 3, "d_out must be [T, G, d]");
  const Tensor d_table = new_d_table(d_out, table_rows, rows.numel(), d_out.size(2), dense);
  Tensor d_weights = run_bwd(indices, table, weights, d_out, order, rows, starts, num_rows, heads, table_rows, groups,
                             layer_rows, offset, dense ? RowGradient::kDense : RowGradient::kRows, d_table);
  return {d_table, d_weights};
}

Tensor bwd_(const Tensor& indices, const OptionalTensor& table, const OptionalTensor& weights, const Tensor& d_out,
            const Tensor& order, const Tensor& rows, const Tensor& starts, const Tensor& num_rows, const Tensor& buffer,
            int64_t heads, int64_t groups, int64_t layer_rows, int64_t offset) {
  const DeviceScope device(d_out);
  STD_TORCH_CHECK(d_out.dim() == 3 && buffer.dim() == 2, "d_out must be [T, G, d], buffer [N, d]");
  check_dense(buffer, "buffer", {buffer.size(0), d_out.size(2)}, wide_type(d_out));
  return run_bwd(indices, table, weights, d_out, order, rows, starts, num_rows, heads, buffer.size(0), groups,
                 layer_rows, offset, RowGradient::kAccumulate, buffer);
}

Activation activation(int64_t act) {
  STD_TORCH_CHECK(act >= 0 && act <= static_cast<int64_t>(Activation::kSilu), "act must be in 0...3");
  return static_cast<Activation>(act);
}

/// Shape of a bag of experts; fills what both directions share.
template <class Params>
void fill_peer(Params& params, const Tensor& indices, const Tensor& table, const Tensor& x,
               const OptionalTensor& weights, int64_t groups, int64_t layer_rows, int64_t offset, int64_t act,
               Allocations& allocations) {
  check_table(table, allocations);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) <= table.size(1), "x must be [T, dp] with dp at most the width of table");
  check_dense(x, "x", {indices.size(0), x.size(1)}, table.scalar_type());
  params.shape = bag_shape(indices, table, table.size(0), table.size(1) - x.size(1), heads_of(weights), groups,
                           layer_rows, offset, allocations);
  params.shape.out_groups = 1, params.query_width = x.size(1), params.act = activation(act);
  check_weights(weights, params.shape, wide_type(table), allocations);
  params.table = data_or_null(table), params.x = data_or_null(x), params.weights = data_or_null(weights);
  allocations.input(x, "x");
}

Tensor peer_fwd(const Tensor& indices, const Tensor& table, const Tensor& x, const OptionalTensor& weights,
                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t groups, int64_t layer_rows,
                int64_t offset, int64_t act) {
  const DeviceScope device(table);
  Allocations allocations;
  PeerBagFwdParams params{};
  fill_peer(params, indices, table, x, weights, groups, layer_rows, offset, act, allocations);
  Tensor out = new_tensor(table, {params.shape.tokens, params.shape.width}, table.scalar_type());
  if (out.numel() == 0) return out;
  if (table.numel() == 0 || indices.numel() == 0) return torch::stable::zero_(out);
  params.out = out.mutable_data_ptr();
  allocations.output(out, "out");
  check_launch(peer_bag_fwd(params, launch_on(table)));
  return out;
}

/// d_x, d_weights (empty without weights), and the sums into d_table if there is a plan.
std::tuple<Tensor, Tensor> run_peer_bwd(const Tensor& indices, const Tensor& table, const Tensor& x,
                                        const OptionalTensor& weights, const Tensor& d_out, const OptionalTensor& order,
                                        const OptionalTensor& rows, const OptionalTensor& starts,
                                        const OptionalTensor& num_rows, int64_t groups, int64_t layer_rows,
                                        int64_t offset, int64_t act, RowGradient kind, Tensor d_table) {
  Allocations allocations;
  PeerBagBwdParams params{};
  fill_peer(params, indices, table, x, weights, groups, layer_rows, offset, act, allocations);
  const BagShape& shape = params.shape;
  check_dense(d_out, "d_out", {shape.tokens, shape.width}, table.scalar_type());
  const ScalarType wide = wide_type(table);
  Tensor d_x = new_tensor(table, {shape.tokens, params.query_width}, table.scalar_type());
  Tensor d_weights = weights.has_value() ? new_tensor(table, {shape.tokens, shape.lookups, shape.heads}, wide)
                                         : new_tensor(table, {0}, wide);
  if (table.numel() == 0 || shape.num_lookups() == 0) {
    if (kind != RowGradient::kAccumulate) torch::stable::zero_(d_table);
    return {torch::stable::zero_(d_x), torch::stable::zero_(d_weights)};
  }
  const bool has_plan = order.has_value();
  const Tensor factors = new_tensor(table, {has_plan ? shape.num_lookups() * shape.heads : 0}, wide);
  const Tensor d_scores = new_tensor(table, {has_plan ? shape.num_lookups() : 0}, wide);
  params.d_out = data_or_null(d_out), params.d_x = data_or_null(d_x), params.d_weights = data_or_null(d_weights);
  params.factors = data_or_null(factors), params.d_scores = data_or_null(d_scores);
  allocations.input(d_out, "d_out"), allocations.output(d_x, "d_x"), allocations.output(d_weights, "d_weights");
  allocations.output(factors, "factors"), allocations.output(d_scores, "d_scores");
  const Launch launch = launch_on(table);
  check_launch(peer_bag_bwd(params, launch));
  if (!has_plan) return {d_x, d_weights};

  // Columns of u: x weighed by the gradients of the scores; columns of v: d_out weighed by the factors.
  MemoryBagBwdParams sums{};
  sums.shape = shape, sums.kind = kind, sums.d_table_stride = params.row_width();
  fill_plan(sums, *order, *rows, *starts, *num_rows, allocations);
  MemoryBagBwdParams of_u = sums, of_v = sums;
  of_u.shape.width = params.query_width, of_u.shape.heads = 1;
  of_u.weights = params.d_scores, of_u.d_out = params.x, of_u.d_table = d_table.mutable_data_ptr();
  of_v.weights = params.factors, of_v.d_out = params.d_out;
  of_v.d_table = static_cast<char*>(of_u.d_table) + params.query_width * d_table.element_size();
  allocations.add(d_table, "d_table", kind == RowGradient::kAccumulate);
  const Tensor workspace =
      new_workspace(table, std::max(memory_bag_bwd_workspace(of_u), memory_bag_bwd_workspace(of_v)));
  of_u.workspace = of_v.workspace = data_or_null(workspace);
  allocations.output(workspace, "workspace");
  if (of_u.shape.width > 0) check_launch(memory_bag_bwd(of_u, launch));
  if (of_v.shape.width > 0) check_launch(memory_bag_bwd(of_v, launch));
  return {d_x, d_weights};
}

std::tuple<Tensor, Tensor, Tensor> peer_bwd(const Tensor& indices, const Tensor& table, const Tensor& x,
                                            const OptionalTensor& weights, const Tensor& d_out,
                                            const OptionalTensor& order, const OptionalTensor& rows,
                                            const OptionalTensor& starts, const OptionalTensor& num_rows,
                                            int64_t groups, int64_t layer_rows, int64_t offset, int64_t act,
                                            bool dense) {
  const DeviceScope device(table);
  STD_TORCH_CHECK(table.dim() == 2, "table must be [N, dp + dv]");
  const Tensor d_table = rows.has_value() ? new_d_table(table, table.size(0), rows->numel(), table.size(1), dense)
                                          : new_tensor(table, {0}, table.scalar_type());
  const auto [d_x, d_weights] =
      run_peer_bwd(indices, table, x, weights, d_out, order, rows, starts, num_rows, groups, layer_rows, offset, act,
                   dense ? RowGradient::kDense : RowGradient::kRows, d_table);
  return {d_table, d_x, d_weights};
}

std::tuple<Tensor, Tensor> peer_bwd_(const Tensor& indices, const Tensor& table, const Tensor& x,
                                     const OptionalTensor& weights, const Tensor& d_out, const Tensor& order,
                                     const Tensor& rows, const Tensor& starts, const Tensor& num_rows,
                                     const Tensor& buffer, int64_t groups, int64_t layer_rows, int64_t offset,
                                     int64_t act) {
  const DeviceScope device(table);
  STD_TORCH_CHECK(table.dim() == 2, "table must be [N, dp + dv]");
  check_dense(buffer, "buffer", {table.size(0), table.size(1)}, wide_type(table));
  return run_peer_bwd(indices, table, x, weights, d_out, order, rows, starts, num_rows, groups, layer_rows, offset, act,
                      RowGradient::kAccumulate, buffer);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("slot_plan", TORCH_BOX(&plan));
  m.impl("memory_bag_fwd", TORCH_BOX(&fwd));
  m.impl("memory_bag_bwd_weights", TORCH_BOX(&bwd_weights));
  m.impl("memory_bag_bwd", TORCH_BOX(&bwd));
  m.impl("memory_bag_bwd_", TORCH_BOX(&bwd_));
  m.impl("peer_bag_fwd", TORCH_BOX(&peer_fwd));
  m.impl("peer_bag_bwd", TORCH_BOX(&peer_bwd));
  m.impl("peer_bag_bwd_", TORCH_BOX(&peer_bwd_));
}

}  // namespace remora
