// Backward: every token gathers from its windows, so no two threads write to one place.
//
//   dy, y, arg, lse [B, S, H, D]   x, gate, dx, dgate [B, T, H, C]   dslot_bias [size, H, C]
//
// bwd      a thread owns VEC channels of the tokens first + phase, first + phase + stride, ... of a block of
// kPoolPeriods
//          periods. A token's slot in the window that begins in its period is `phase`, so its share of dslot_bias stays
//          in registers; in windows that begin before (stride < size) the slots are phase + k stride, also this
//          thread's alone, and their shares go through the workspace
// reduce   adds the blocks' shares in order
#pragma once
#include "segment/segment_pool/pool_vector.cuh"

namespace remora {

template <typename T, PoolKind KIND, int VEC>
__global__ void __launch_bounds__(kPoolThreads)
    segment_pool_bwd_kernel(const __grid_constant__ SegmentPoolBwdParams p) {
  constexpr bool kHasLogits = KIND == PoolKind::kSoftmax || KIND == PoolKind::kWeighted;
  const PoolShape& shape = p.shape;
  const int64_t input_channels = shape.input_channels();
  const int64_t num_vectors = shape.heads * (input_channels / VEC);
  int64_t index = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  const PoolLane at = PoolLane::at<VEC>(index % num_vectors, input_channels);
  index /= num_vectors;
  const int64_t phase = index % shape.stride, block = index / shape.stride;
  if (block >= shape.num_blocks()) return;
  const int64_t seq_idx = shape.sequence_of_block(block), in_sequence = shape.block_in_sequence(block, seq_idx);
  const PoolSequence sequence = shape.sequence(seq_idx);
  const bool of_previous = shape.dual && at.channel < shape.channels;
  const int64_t slot_size = shape.heads * input_channels;
  const int64_t own_slots = at.head * input_channels + at.channel;  // within a slot
  float* const share =
      p.dslot_bias != nullptr ? static_cast<float*>(p.workspace) + block * shape.size * slot_size + own_slots : nullptr;
  const int64_t most = phase < shape.size ? (shape.size - 1 - phase) / shape.stride : -1;  // k of the last slot

  float d_bias[VEC] = {};
  if (share != nullptr) {
    for (int64_t k = 1; k <= most; ++k) {
      store_words<float, VEC>(share + (phase + k * shape.stride) * slot_size, d_bias);
    }
  }
  for (int64_t period = 0; period < kPoolPeriods; ++period) {
    const int64_t window = in_sequence * kPoolPeriods + period;  // that begins in this period
    const int64_t local = window * shape.stride + phase;
    if (in_sequence < 0 || local >= sequence.length) break;
    const int64_t token = sequence.begin + local;

    // Its windows are `last_window - k`, k in [first, last]
    int64_t last_window = window + of_previous, first, last;
    if (shape.is_ragged()) {
      last_window = shape.segment_ids[sequence.batch * shape.seqlen + token];
      bool exists = last_window >= 0 && last_window < shape.num_windows;
      if (exists && p.mode == PoolMode::kLast) {
        const PoolWindow own = shape.window(sequence.batch, last_window);
        exists = token == own.first + own.count - 1;
      }
      first = 0, last = exists ? 0 : -1;
    } else {
      first = max(int64_t{0}, last_window - sequence.num_windows + 1), last = min(last_window, most);
      if (p.mode == PoolMode::kLast) {
        first = max(first, most);
        if (phase + most * shape.stride != shape.size - 1) last = -1;
      }
      last_window += sequence.first_window;
    }
    float divisor = 1.f;
    if (p.mode == PoolMode::kMean && first <= last) {
      const int64_t size = shape.is_ragged() ? shape.window(sequence.batch, last_window).count : shape.size;
      const bool is_double = shape.dual && last_window > sequence.first_window;
      divisor = static_cast<float>(max(is_double ? 2 * size : size, int64_t{1}));
    }

    const int64_t input =
        ((sequence.batch * shape.seqlen + token) * shape.heads + at.head) * input_channels + at.channel;
    const int64_t row = ((sequence.batch * shape.num_windows + last_window) * shape.heads + at.head) * shape.channels +
                        at.channel - (shape.dual && !of_previous ? shape.channels : 0);
    float x[VEC] = {}, gate[VEC] = {}, dx[VEC] = {}, dgate[VEC] = {};
    if constexpr (kHasLogits) {
      load_vector<T, VEC>(x, static_cast<const T*>(p.x) + at.in(p.x_stride, sequence.batch, token));
      if (p.gate != nullptr) {
        load_vector<T, VEC>(gate, static_cast<const T*>(p.gate) + at.in(p.gate_stride, sequence.batch, token));
      }
    }
    for (int64_t k = first; k <= last; ++k) {
      const int64_t from = row - k * shape.heads * shape.channels;
      float d[VEC];
      load_vector<T, VEC>(d, static_cast<const T*>(p.dy) + from);
      if constexpr (KIND == PoolKind::kLinear) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) dx[i] += d[i] / divisor;
      } else if constexpr (KIND == PoolKind::kMax) {
        int arg[VEC];
        load_words<int, VEC>(arg, p.arg + from);
#pragma unroll
        for (int i = 0; i < VEC; ++i) dx[i] += arg[i] == token ? d[i] : 0.f;
      } else {
        float of_logit[VEC], bias[VEC] = {};
        const int64_t slot_offset = (phase + k * shape.stride) * slot_size;
        if (p.slot_bias != nullptr) {
          load_words<float, VEC>(bias, static_cast<const float*>(p.slot_bias) + slot_offset + own_slots);
        }
        if constexpr (KIND == PoolKind::kSoftmax) {
          float lse[VEC], y[VEC];
          load_words<float, VEC>(lse, static_cast<const float*>(p.lse) + from);
          load_vector<T, VEC>(y, static_cast<const T*>(p.y) + from);
#pragma unroll
          for (int i = 0; i < VEC; ++i) {
            const float weighted = expf(gate[i] + bias[i] - lse[i]) * d[i];
            dx[i] += weighted;
            of_logit[i] = weighted * (x[i] - y[i]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < VEC; ++i) {
            dx[i] = fmaf(gate[i] + bias[i], d[i], dx[i]);
            of_logit[i] = x[i] * d[i];
          }
        }
#pragma unroll
        for (int i = 0; i < VEC; ++i) dgate[i] += of_logit[i];
        if (share != nullptr && k == 0) {
#pragma unroll
          for (int i = 0; i < VEC; ++i) d_bias[i] += of_logit[i];
        } else if (share != nullptr) {
          float sum[VEC];
          load_words<float, VEC>(sum, share + slot_offset);
#pragma unroll
          for (int i = 0; i < VEC; ++i) sum[i] += of_logit[i];
          store_words<float, VEC>(share + slot_offset, sum);
        }
      }
    }
    store_vector<T, VEC>(static_cast<T*>(p.dx) + input, dx);
    if constexpr (kHasLogits) {
      if (p.dgate != nullptr) store_vector<T, VEC>(static_cast<T*>(p.dgate) + input, dgate);
    }
  }
  if (share != nullptr && phase < shape.size) store_words<float, VEC>(share + phase * slot_size, d_bias);
}

inline __global__ void __launch_bounds__(kPoolThreads)
    segment_pool_reduce_kernel(const __grid_constant__ SegmentPoolBwdParams p) {
  const int64_t entries = p.shape.size * p.shape.heads * p.shape.input_channels();
  const int64_t entry = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  if (entry >= entries) return;
  const int64_t num_blocks = p.shape.num_blocks();
  float sum = 0.f;
#pragma unroll 8
  for (int64_t block = 0; block < num_blocks; ++block) {
    sum += static_cast<const float*>(p.workspace)[block * entries + entry];
  }
  static_cast<float*>(p.dslot_bias)[entry] = sum;
}

}  // namespace remora
