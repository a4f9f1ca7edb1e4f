// Arguments of the selective scan, shared by the CPU and CUDA kernels. Sequences: recurrence/shape.h, without rows; the
// D channels are one head of K = V = D there.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "recurrence/shape.h"

namespace remora {

/// Channels of one task or CTA; they belong to one group. Sums over the channels of a group run over its blocks in
/// order, so they do not depend on the machine.
constexpr int64_t kScanChannels = 32;

constexpr int64_t kScanMaxStates = 256;

/// Tokens between two saved states. Sequence n that begins at token b of the flattened [B * T] tokens owns the slots
/// b / kScanInterval + n + i: they hold the state that enters its token i * kScanInterval (in scan order).
constexpr int64_t kScanInterval = 64;

constexpr int64_t first_scan_slot(int64_t first_token, int64_t seq_idx) {
  return first_token / kScanInterval + seq_idx;
}

constexpr int64_t num_scan_slots(int64_t total_tokens, int64_t num_seqs) {
  return total_tokens / kScanInterval + num_seqs;
}

/// Element strides of a [B, T, D] tensor.
struct ScanStrides {
  int64_t batch, token, channel;
};

/// Element strides of a [B, T, G, N] tensor.
struct ScanGroupStrides {
  int64_t batch, token, group, state;
};

struct SelectiveScanShape {
  RecurrenceShape sequences;
  int64_t num_channels;  // D
  int64_t num_groups;    // G, divides D: channel d reads B and C of group d / (D / G)
  int64_t state_dim;     // N

  constexpr int64_t group_channels() const { return num_channels / num_groups; }
  constexpr int64_t blocks_per_group() const { return (group_channels() + kScanChannels - 1) / kScanChannels; }
  constexpr int64_t num_channel_blocks() const { return num_groups * blocks_per_group(); }
};

/// What every pass reads.
struct SelectiveScanInputs {
  SelectiveScanShape shape;
  DType dtype;        // of u, delta, z, B, C, out
  DType state_dtype;  // of A, D, delta_bias and the states: float32, or float64 if dtype is
  bool delta_softplus;
  bool reverse;  // scans each sequence from its last token to its first

  const void* u;      // [B, T, D]
  const void* delta;  // [B, T, D]
  const void* z;      // [B, T, D] or null: no gate
  ScanStrides u_stride, delta_stride, z_stride;
  const void* b;  // [B, T, G, N]
  const void* c;  // [B, T, G, N]
  ScanGroupStrides b_stride, c_stride;
  const void* a;              // [D, N]
  const void* skip;           // [D] or null: zero
  const void* delta_bias;     // [D] or null: zero
  const int32_t* cu_seqlens;  // [num_seqs + 1] or null
};

struct SelectiveScanFwdParams {
  SelectiveScanInputs in;
  const void* initial_state;  // [num_seqs, D, N] or null: zero

  void* out;  // [B, T, D], out_stride
  ScanStrides out_stride;
  void* final_state;   // [num_seqs, D, N] or null
  void* saved_states;  // [num_scan_slots, D, N] state_dtype, or null; slots without tokens stay unwritten

  void* workspace;  // selective_scan_fwd_workspace() bytes, uninitialised
};

struct SelectiveScanBwdParams {
  SelectiveScanInputs in;
  const void* saved_states;  // [num_scan_slots, D, N], as the forward pass wrote it
  const void* d_out;         // [B, T, D], d_out_stride
  ScanStrides d_out_stride;
  const void* d_final_state;  // [num_seqs, D, N] or null: zero

  void* du;      // [B, T, D], strides as out_stride of the forward pass
  void* ddelta;  // [B, T, D]
  void* dz;      // [B, T, D] or null
  ScanStrides d_stride;
  void* db;               // [B, T, G, N] contiguous
  void* dc;               // [B, T, G, N] contiguous
  void* da;               // [D, N] state_dtype
  void* dskip;            // [D] or null
  void* ddelta_bias;      // [D] or null
  void* d_initial_state;  // [num_seqs, D, N] or null

  void* workspace;  // selective_scan_bwd_workspace() bytes, uninitialised
};

/// One token of each sequence: T == 1 and num_seqs == B. The pool of states is updated in place.
struct SelectiveScanStepParams {
  SelectiveScanInputs in;
  const int32_t* state_indices;  // [B] or null; outside [0, num_slots): sequence skipped, its output zero
  void* state;                   // [num_slots, D, N]
  int64_t num_slots;
  void* out;  // [B, 1, D] contiguous
};

}  // namespace remora
