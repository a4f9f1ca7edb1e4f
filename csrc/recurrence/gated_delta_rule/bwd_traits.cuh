// Tile sizes and shared memory of the two kernels of the backward pass.
#pragma once
#include <type_traits>

#include "recurrence/gated_delta_rule/params.h"
#include "recurrence/gated_delta_rule/prepare.cuh"

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

/// State kernel: warps 0..3 carry 16 columns of V each; kNumGroups groups of four warps load and prepare chunks in
/// turn, as preparing takes about as long as two steps of the chain. A stage holds one chunk; one where shared memory
/// is small.
template <typename T_, int HEAD_DIM_, int kNumStages_>
struct BwdStateTraits : BwdTraits<T_, HEAD_DIM_> {
  static constexpr int BLOCK_V = 64;
  static constexpr int kNumChainWarps = BLOCK_V / 16;
  static constexpr int kNumStages = kNumStages_;
  static constexpr int kNumGroups = kNumStages == 1 || sizeof(T_) == 4 ? 1 : 2;  // float: for want of registers
  static constexpr int kNumPrepareWarps = 4;                                     // of a group
  static constexpr int kNumThreads = (kNumChainWarps + kNumGroups * kNumPrepareWarps) * 32;

  enum Barrier { kPrepareRole = 1, kFull = kPrepareRole + kNumGroups, kEmpty = kFull + kNumStages };

  struct Smem {
    using Base = BwdTraits<T_, HEAD_DIM_>;
    struct Stage {
      alignas(128) uint8_t q[Base::BLOCK_T * HEAD_DIM_ * sizeof(T_)];
      alignas(128) uint8_t k[Base::BLOCK_T * HEAD_DIM_ * sizeof(T_)];
      alignas(128) uint8_t d_o[Base::BLOCK_T * BLOCK_V * sizeof(T_)];  // X on the way out
      alignas(128) uint8_t a[CausalTile<T_, Base::BLOCK_T>::SIZE];
      alignas(128) uint8_t y[CausalTile<typename Base::TY, Base::BLOCK_T>::SIZE];
      ChunkCoefficients<Base::BLOCK_T> coef;
      int32_t rows[Base::BLOCK_T];  // of the tokens, from the sequence's first or, with routed rows, the tensor's
    } stage[kNumStages];
    alignas(128) uint8_t scratch[kNumGroups][CausalTile<float, Base::BLOCK_T>::SIZE];
    /// Where a warp of the chain writes, for the first chunk of the sequence; here for want of registers.
    struct Target {
      typename Base::TSaved* d_state;
      T_* x;
      int64_t value_stride, state_offset;  // the latter in the initial and final state
      int num_tokens;
      int num_v;  // columns of V from the warp's first on
    } target[kNumChainWarps];
  };
};

/// Chunk kernel: a warp owns 16 tokens and half of the columns; V in tiles of BLOCK_V, kNumStages of them in flight.
template <typename T_, int HEAD_DIM_, bool kIsSmall>
struct BwdChunkTraits : BwdTraits<T_, HEAD_DIM_> {
  using Base = BwdTraits<T_, HEAD_DIM_>;
  static constexpr int BLOCK_T = Base::BLOCK_T;
  static constexpr int BLOCK_V = 32;
  static constexpr int kNumWarps = BLOCK_T / 16 * 2;
  static constexpr int kNumThreads = kNumWarps * 32;
  static constexpr int kNumStages = kIsSmall ? 1 : 2;
  static constexpr int kChunksPerState = kStateInterval / BLOCK_T;

  struct Smem {
    alignas(128) uint8_t k[BLOCK_T * HEAD_DIM_ * sizeof(T_)];
    alignas(128) uint8_t q[BLOCK_T * HEAD_DIM_ * sizeof(T_)];  // keys of an earlier chunk until the last V tile
    struct Stage {
      alignas(128) uint8_t state[HEAD_DIM_ * BLOCK_V * sizeof(T_)];
      alignas(128) uint8_t d_state[BLOCK_V * HEAD_DIM_ * sizeof(T_)];
      alignas(128) uint8_t d_o[BLOCK_T * BLOCK_V * sizeof(T_)];
      alignas(128) uint8_t u[BLOCK_T * BLOCK_V * sizeof(T_)];   // V on entry
      alignas(128) uint8_t dv[BLOCK_T * BLOCK_V * sizeof(T_)];  // X on entry
      alignas(128) uint8_t earlier_u[BLOCK_T * BLOCK_V * sizeof(T_)];
    };
    /// Used before the first and after the last V tile.
    struct Pairs {
      alignas(128) uint8_t scratch[2][CausalTile<float, BLOCK_T>::SIZE];
    };
    struct Weights {
      alignas(128) uint8_t a[CausalTile<T_, BLOCK_T>::SIZE];
      alignas(128) uint8_t l[CausalTile<T_, BLOCK_T>::SIZE];
    };
    union {
      Stage stage[kNumStages];
      Weights weights;
    };
    alignas(128) uint8_t y[2][CausalTile<typename Base::TY, BLOCK_T>::SIZE];  // of the chunk, of an earlier one
    alignas(128) uint8_t residual[BLOCK_T * BLOCK_V * sizeof(typename Base::TY)];
    ChunkCoefficients<BLOCK_T> coef[2];
    /// First elements of this CTA's rows, here because accumulators fill the registers.
    struct Source {
      const T_ *q, *k, *v, *d_o;
      T_* dv;
      const typename Base::TSaved *state, *d_state;
      const float *g, *beta;
      const int32_t* rows;  // of the chunk, or null
    } source;
    float warp_values[kNumWarps];
    float row_sums[4][2][BLOCK_T];
    float column_sums[BLOCK_T / 16][BLOCK_T];
  };
};

}  // namespace remora
