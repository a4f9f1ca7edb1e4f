// Torch side of the assignment to codes: check, allocate, fill the params, launch. Compiled once per backend.
#include <tuple>

#include "segment/vq_assign/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

std::tuple<Tensor, Tensor> assign(const Tensor& x, const Tensor& codebook, const OptionalTensor& mask) {
  const DeviceScope device(x);
  STD_TORCH_CHECK(x.dim() == 4 && codebook.dim() == 3, "x must be [B, H, T, D], codebook [H, S, D]");
  VqAssignParams params{};
  params.dtype = dtype_of(x, "x");
  params.batch = x.size(0), params.heads = x.size(1), params.tokens = x.size(2), params.dims = x.size(3);
  params.codes = codebook.size(1);
  STD_TORCH_CHECK(params.codes >= 1 && params.codes < INT32_MAX && params.dims >= 1, "S and D must be positive");
  STD_TORCH_CHECK(x.stride(3) == 1, "x must have contiguous rows");
  check_dense(codebook, "codebook", {params.heads, params.codes, params.dims}, x.scalar_type());
  check_dense(mask, "mask", {params.batch, params.tokens}, ScalarType::Byte);
  const ScalarType wide = params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor idx = new_tensor(x, {params.batch, params.heads, params.tokens}, ScalarType::Int);
  Tensor err2 = new_tensor(x, {params.batch, params.heads, params.tokens}, wide);
  if (idx.numel() == 0) return {err2, idx};

  params.x = x.const_data_ptr(), params.codebook = codebook.const_data_ptr();
  params.x_stride_batch = x.stride(0), params.x_stride_head = x.stride(1), params.x_stride_token = x.stride(2);
  params.mask = static_cast<const uint8_t*>(data_or_null(mask));
  params.idx = static_cast<int32_t*>(idx.mutable_data_ptr()), params.err2 = err2.mutable_data_ptr();
  const Tensor workspace = new_workspace(x, vq_assign_workspace(params));
  params.workspace = data_or_null(workspace);
  Allocations allocations;
  allocations.input(x, "x"), allocations.input(codebook, "codebook"), allocations.input(mask, "mask");
  allocations.output(idx, "idx"), allocations.output(err2, "err2"), allocations.output(workspace, "workspace");
  check_launch(vq_assign(params, launch_on(x)));
  return {err2, idx};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) { m.impl("vq_assign", TORCH_BOX(&assign)); }

}  // namespace remora
