// Torch side of the running sums of values per code: check, allocate, fill the params, launch. Compiled once per
// backend.
#include <tuple>

#include "segment/code_prefix/launch.h"
#include "torch/stable.h"

namespace remora {
namespace {

struct CodePrefixSizes {
  int64_t batch, heads, tokens, channels, codes, borders;
  ScalarType type, wide;

  CodePrefixSizes(const Tensor& idx, int64_t num_channels, int64_t num_codes, int64_t chunk, ScalarType element)
      : type(element), wide(element == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    STD_TORCH_CHECK(idx.dim() == 3 && num_codes >= 1 && num_codes < INT32_MAX && chunk >= 1,
                    "idx must be [B, H, T], n_code and chunk positive");
    batch = idx.size(0), heads = idx.size(1), tokens = idx.size(2), channels = num_channels, codes = num_codes;
    borders = (tokens + chunk - 1) / chunk;
    check_dense(idx, "idx", {batch, heads, tokens}, ScalarType::Int);
  }
  CodePrefixShape shape(int64_t chunk) const {
    return {.rows = batch * heads,
            .heads = heads,
            .tokens = tokens,
            .channels = channels,
            .codes = codes,
            .chunk = chunk,
            .v_stride_batch = heads * tokens * channels,
            .v_stride_head = tokens * channels,
            .v_stride_token = channels};
  }
  void check_count(const OptionalTensor& x, const char* name) const {
    check_dense(x, name, {batch, heads, codes}, wide);
  }
  void check_mean(const OptionalTensor& x, const char* name) const {
    check_dense(x, name, {batch, heads, codes, channels}, wide);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(const Tensor& idx, const Tensor& v, const OptionalTensor& initial_count,
                                               const OptionalTensor& initial_mean, int64_t codes, int64_t chunk) {
  const DeviceScope device(v);
  STD_TORCH_CHECK(v.dim() == 4 && v.stride(3) == 1, "v must be [B, H, T, D] with contiguous rows");
  CodePrefixFwdParams params{};
  params.dtype = dtype_of(v, "v");
  const CodePrefixSizes s(idx, v.size(3), codes, chunk, v.scalar_type());
  check_shape(v, "v", {s.batch, s.heads, s.tokens, s.channels});
  STD_TORCH_CHECK(initial_count.has_value() == initial_mean.has_value(), "initial count and mean come together");
  s.check_count(initial_count, "initial_count"), s.check_mean(initial_mean, "initial_mean");
  params.shape = s.shape(chunk);
  params.shape.v_stride_batch = v.stride(0), params.shape.v_stride_head = v.stride(1);
  params.shape.v_stride_token = v.stride(2);
  Tensor log_count = new_tensor(v, {s.batch, s.heads, s.borders, s.codes}, s.wide);
  Tensor mean = new_tensor(v, {s.batch, s.heads, s.borders, s.codes, s.channels}, s.type);
  Tensor final_count = new_tensor(v, {s.batch, s.heads, s.codes}, s.wide);
  Tensor final_mean = new_tensor(v, {s.batch, s.heads, s.codes, s.channels}, s.wide);
  if (params.shape.rows == 0) return {log_count, mean, final_count, final_mean};

  Allocations allocations;
  params.idx = static_cast<const int32_t*>(data_or_null(idx)), params.v = data_or_null(v);
  params.initial_count = data_or_null(initial_count), params.initial_mean = data_or_null(initial_mean);
  params.log_count = data_or_null(log_count), params.mean = data_or_null(mean);
  params.final_count = data_or_null(final_count), params.final_mean = data_or_null(final_mean);
  allocations.input(idx, "idx"), allocations.input(v, "v"), allocations.input(initial_count, "initial_count");
  allocations.input(initial_mean, "initial_mean"), allocations.output(log_count, "log_count");
  allocations.output(mean, "mean"), allocations.output(final_count, "final_count");
  allocations.output(final_mean, "final_mean");
  check_launch(code_prefix_fwd(params, launch_on(v)));
  return {log_count, mean, final_count, final_mean};
}

std::tuple<Tensor, Tensor> bwd(const Tensor& idx, const OptionalTensor& initial_count, const Tensor& final_count,
                               const Tensor& d_mean, const OptionalTensor& d_final_mean, int64_t chunk) {
  const DeviceScope device(d_mean);
  STD_TORCH_CHECK(d_mean.dim() == 5, "d_mean must be [B, H, N, S, D]");
  CodePrefixBwdParams params{};
  params.dtype = dtype_of(d_mean, "d_mean");
  const CodePrefixSizes s(idx, d_mean.size(4), d_mean.size(3), chunk, d_mean.scalar_type());
  check_dense(d_mean, "d_mean", {s.batch, s.heads, s.borders, s.codes, s.channels}, s.type);
  s.check_count(initial_count, "initial_count"), s.check_count(final_count, "final_count");
  s.check_mean(d_final_mean, "d_final_mean");
  params.shape = s.shape(chunk);
  Tensor dv = new_tensor(d_mean, {s.batch, s.heads, s.tokens, s.channels}, s.type);
  Tensor d_initial_mean = initial_count.has_value()
                              ? new_tensor(d_mean, {s.batch, s.heads, s.codes, s.channels}, s.wide)
                              : new_tensor(d_mean, {0}, s.wide);
  if (params.shape.rows == 0) return {dv, d_initial_mean};

  Allocations allocations;
  params.idx = static_cast<const int32_t*>(data_or_null(idx)), params.initial_count = data_or_null(initial_count);
  params.final_count = data_or_null(final_count), params.d_mean = data_or_null(d_mean);
  params.d_final_mean = data_or_null(d_final_mean), params.dv = data_or_null(dv);
  params.d_initial_mean = data_or_null(d_initial_mean);
  allocations.input(idx, "idx"), allocations.input(initial_count, "initial_count");
  allocations.input(final_count, "final_count"), allocations.input(d_mean, "d_mean");
  allocations.input(d_final_mean, "d_final_mean"), allocations.output(dv, "dv");
  allocations.output(d_initial_mean, "d_initial_mean");
  check_launch(code_prefix_bwd(params, launch_on(d_mean)));
  return {dv, d_initial_mean};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(remora, REMORA_DISPATCH_KEY, m) {
  m.impl("code_prefix_fwd", TORCH_BOX(&fwd));
  m.impl("code_prefix_bwd", TORCH_BOX(&bwd));
}

}  // namespace remora
