// Tile sizes and shared memory of the two kernels of the backward pass.
#pragma once
#include <type_traits>

#include "common/hints.cuh"
#include "recurrence/gated_delta_rule/bwd_launch.h"
#include "recurrence/gated_delta_rule/params.h"
#include "recurrence/gated_delta_rule/prepare.cuh"
#include "recurrence/gated_delta_rule/traits.h"
#include "recurrence/sequence.cuh"

namespace remora {

/// What both kernels share. 16-bit inputs: chunks of 64 tokens, Y in fp16 (|Y| <= 1 for unit keys, 8 times finer than
/// bf16). float: chunks of 32 tokens, so that the tiles fit.
template <typename T_, int HEAD_DIM_>
struct BwdTraits {
  using T = T_;
  using TY = std::conditional_t<sizeof(T) == 2, __half, float>;
  using TSaved = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat16, float>;
  static constexpr int HEAD_DIM = HEAD_DIM_;
  static constexpr int BLOCK_T = sizeof(T) == 2 ? 64 : 32;
};

/// Where dS^T of a warp lies in a tensor of states or of maps; null: nowhere.
template <typename Float>
struct StatePlace {
  Float* data;
  int64_t k_stride, v_stride;
  int num_k, num_v;  // within the warp's 16 columns of V

  template <typename Body>
  __device__ __forceinline__ void for_each(int tile, const Body& body) const {
    const int lane_idx = read_thread_idx() % 32, row = lane_idx / 4, col = lane_idx % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = tile * 8 + col + i % 2, v = row + i / 2 * 8;
      if (k < num_k && v < num_v) body(i, data[k * k_stride + v * v_stride]);
    }
  }
};

/// The tokens and columns of a CTA of the state kernel.
struct BwdWalk {
  int64_t seq_idx, head, first_token, chunk_slot;  // the latter of the first chunk
  int64_t slot;                                    // of the span's map
  TokenRow first;                                  // offsets are those of this token or, with rows, of the first row
  int num_tokens, v0;
  bool is_first, is_last;  // of the sequence's spans
  bool is_transition;      // columns of the identity instead of V
  bool writes_inverse;
};

/// State kernel: warps 0..3 carry 16 columns of V each; kNumGroups groups of four warps load and prepare chunks in
/// turn, as preparing takes about as long as two steps of the chain. What a chunk is given lies in a ring of
/// kNumInputs, what is made of it in one of kNumStages; with an input more than that, a group loads its next chunk
/// while it prepares one.
template <typename T_, int HEAD_DIM_, int kNumStages_>
struct BwdStateTraits : BwdTraits<T_, HEAD_DIM_> {
  static constexpr int BLOCK_V = kSpanBlockV;
  static constexpr int kNumChainWarps = BLOCK_V / 16;
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kNumInputs = kNumStages == 3 ? 4 : kNumStages;
  static constexpr bool kLoadsAhead = kNumInputs > kNumStages;
  // Two where registers last: bfloat16.
  static constexpr int kNumGroups = kNumStages > 1 && std::is_same_v<T_, __nv_bfloat16> ? 2 : 1;
  static constexpr int kNumPrepareWarps = 4;  // of a group
  static constexpr int kNumThreads = (kNumChainWarps + kNumGroups * kNumPrepareWarps) * 32;

  enum Barrier {
    kPrepareRole = 1,                   // per group, among its warps
    kFull = kPrepareRole + kNumGroups,  // per stage: group -> chain
    kEmpty = kFull + kNumStages,        // per stage: chain -> group
    kRead = kEmpty + kNumStages,        // per input: chain -> group
  };

  struct Smem {
    using Base = BwdTraits<T_, HEAD_DIM_>;
    struct Input {
      alignas(128) uint8_t q[Base::BLOCK_T * HEAD_DIM_ * sizeof(T_)];
      alignas(128) uint8_t k[Base::BLOCK_T * HEAD_DIM_ * sizeof(T_)];
      alignas(128) uint8_t d_o[Base::BLOCK_T * BLOCK_V * sizeof(T_)];  // X on the way out
      ChunkCoefficients<Base::BLOCK_T> coef;
      int32_t rows[Base::BLOCK_T];  // of the tokens, from the span's first or, with routed rows, the tensor's
    } input[kNumInputs];
    struct Stage {
      alignas(128) uint8_t a[CausalTile<T_, Base::BLOCK_T>::SIZE];
      alignas(128) uint8_t y[CausalTile<typename Base::TY, Base::BLOCK_T>::SIZE];
    } stage[kNumStages];
    alignas(128) uint8_t scratch[kNumGroups][CausalTile<float, Base::BLOCK_T>::SIZE];
    /// Where a warp of the chain writes, for the first chunk of the sequence; here for want of registers.
    struct Target {
      typename Base::TSaved* d_state;
      T_* x;
      StatePlace<float> exit;  // where dS goes in the end
      int num_v;  // columns of V from the warp's first on; 0 in a summary, which writes neither X nor the d_states
    } target[kNumChainWarps];
    BwdWalk walk;
  };
};

/// Parts of the columns that the warps of the chunk kernel share.
constexpr int kBwdParts = 4;

/// Chunk kernel: a warp owns 16 tokens and one part of the columns; V in tiles of BLOCK_V, kNumStages of them in
/// flight.
template <typename T_, int HEAD_DIM_, int BLOCK_V_, int kNumStages_>
struct BwdChunkTraits : BwdTraits<T_, HEAD_DIM_> {
  using Base = BwdTraits<T_, HEAD_DIM_>;
  static constexpr int BLOCK_T = Base::BLOCK_T;
  static constexpr int BLOCK_V = BLOCK_V_;
  static constexpr int kNumWarps = BLOCK_T / 16 * kBwdParts;
  static constexpr int kNumThreads = kNumWarps * 32;
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kChunksPerState = kStateInterval / BLOCK_T;
  static constexpr int STATE_V = bwd_state_columns(sizeof(T_), kNumStages);

  struct Smem {
    alignas(128) uint8_t state[STATE_V / BLOCK_V][HEAD_DIM_ * BLOCK_V * sizeof(T_)];
    alignas(128) uint8_t k[kNumStages][BLOCK_T * HEAD_DIM_ * sizeof(T_)];  // of chunks in turn, as y and coef
    alignas(128) uint8_t q[BLOCK_T * HEAD_DIM_ * sizeof(T_)];
    struct Stage {
      alignas(128) uint8_t d_state[BLOCK_V * HEAD_DIM_ * sizeof(T_)];
      alignas(128) uint8_t value[3][BLOCK_T * BLOCK_V * sizeof(T_)];  // V, then U; X, then dV; dO
    } stage[kNumStages];
    /// In place of the stage of a chunk's last V tile.
    struct Epilogue {
      alignas(128) uint8_t a[CausalTile<T_, BLOCK_T>::SIZE];  // dA, dL
      alignas(128) uint8_t l[CausalTile<T_, BLOCK_T>::SIZE];
      float row_sums[3][kBwdParts][BLOCK_T];
      float column_sums[BLOCK_T / 16][BLOCK_T];
    };
    alignas(128) uint8_t y[kNumStages][CausalTile<typename Base::TY, BLOCK_T>::SIZE];
    alignas(128) uint8_t residual[BLOCK_T * BLOCK_V * sizeof(T_)];  // beta R', then U weighted
    float residual_up[kBwdParts][BLOCK_T / 16];                     // what undoes the scaling of beta R'
    float dbeta_sums[kBwdParts][BLOCK_T];
    float state_dots[kNumWarps];
    ChunkCoefficients<BLOCK_T> coef[kNumStages];
    /// Where this pass reads, here because accumulators fill the registers: the tensors at its head and columns.
    struct Source {
      const T_ *q, *k, *value[3];
      TokenStrides value_stride[3];
      const typename Base::TSaved *state, *d_state;
      const uint8_t* inverse;
      int64_t head, key_head;
      int num_cols, num_tiles;  // of V
      int pass;
      bool is_last;  // of the passes
      bool adds;     // to dg and dbeta of the columns of V before
    } source;
    struct {
      int batch, token;
    } place[kStateInterval];  // of the tokens
    Chunk interval;
  };
};

}  // namespace remora
