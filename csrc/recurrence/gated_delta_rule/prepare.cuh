// The part of a chunk that depends on neither the state nor V: gates, norms, and two lower triangular matrices.
//
//   G_i    = g_1 + ... + g_i                               local cumulative log decay, kept in units of log 2
//   rk_i   = 1 / sqrt(|k_i|^2 + 1e-6), rq_i likewise       or 1 without use_qk_l2norm
//   A_ij   = scale rq_i rk_j (q_i . k_j) e^{G_i - G_j}     i >= j, else 0
//   Y      : (I + L diag(beta)) Y0 = L with L_ij = rk_i rk_j (k_i . k_j), i > j;  Y_ij = Y0_ij e^{G_i - G_j}
//
// A and -Y (or -Y diag(beta)) are stored as 16x16 blocks on and below the diagonal (CausalTile). |Y| <= 1 for unit
// keys and 0 <= beta <= 2, and the gate is applied to the solved Y0: the inverse never sees it.
//
// Inverse: diagonal blocks by forward substitution in fp32, one lane a column; below them, column of blocks j by
// one warp in the transposed form, so that accumulators feed the next product as operands:
//   X^T = L_ij^T - sum_{j <= m < i} (Y0_mj^T diag(beta_m)) L_im^T ;  Y0_ij^T = X^T - (X^T diag(beta_i)) Y0_ii^T
// The products are tf32 (3xTF32 for float), the identity parts exact.
//
// Causal to the bit: an entry above the diagonal is selected to zero, and what multiplies such zeros is kept finite
// (`bounded`), so a later token's NaN or overflow never reaches an earlier token's row.
// The kernels that prepare chunks run several roles side by side, and all their loops have to fit the instruction
// cache: rows and columns of blocks are loops at run time, only what indexes registers is unrolled.
#pragma once
#include "common/barrier.cuh"
#include "common/math.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/smem_tile.cuh"

namespace remora {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMinLogDecay = -88.f;
constexpr float kNormEpsilon = 1e-6f;

/// A cumulative log decay. With kHasRest the sum and its rounding error: after resets of -88 in a chunk, differences of
/// single fp32 numbers would lose the digits that follow.
template <bool kHasRest>
struct LogDecay {
  float sum, rest;
  __device__ __forceinline__ float operator-(const LogDecay& other) const {
    if constexpr (kHasRest) return (sum - other.sum) + (rest - other.rest);
    return sum - other.sum;
  }
};

/// Per-token numbers of one chunk, in shared memory. `g` (natural log) and `beta` are inputs; tokens past the end of
/// the sequence have g = beta = 0 and zero rows of K and Q, which makes them no-ops.
template <int BLOCK_T>
struct ChunkCoefficients {
  static constexpr bool kHasRest = BLOCK_T == 32;  // the chunks of float
  using Decay = LogDecay<kHasRest>;
  alignas(128) float g[BLOCK_T];  // with kHasRest, once G is known: what G is rounded by
  float beta[BLOCK_T];
  float cumsum[BLOCK_T];  // G in units of log 2
  float rstd_k[BLOCK_T];
  float rstd_q[BLOCK_T];
  float k_in[BLOCK_T];   // rk_i e^{G_i}: weights k_i where it meets the state entering the chunk
  float k_out[BLOCK_T];  // rk_i e^{G_C - G_i}: where it meets the state leaving it
  float q_in[BLOCK_T];   // scale rq_i e^{G_i}
  float a_up[BLOCK_T];   // where rows of A are stored scaled: the power of two that undoes it

  __device__ __forceinline__ Decay decay_at(int i) const { return {cumsum[i], kHasRest ? g[i] : 0.f}; }
};

/// Blocks (i, j), i >= j, of a lower triangular matrix of BLOCK_T x BLOCK_T, one after another.
template <typename T, int BLOCK_T>
struct CausalTile {
  static constexpr int NUM_BLOCKS = BLOCK_T / 16;
  static constexpr int SIZE = NUM_BLOCKS * (NUM_BLOCKS + 1) / 2 * SmemBlock<T>::SIZE;
  __device__ static constexpr int block(int i, int j) { return (i * (i + 1) / 2 + j) * SmemBlock<T>::SIZE; }
};

/// Shared memory of one chunk as prepare_chunk sees it: addresses in the shared window.
template <int BLOCK_T>
struct ChunkTiles {
  uint32_t k, q;     // SmemTile<T, HEAD_DIM> of BLOCK_T rows
  uint32_t a, y;     // CausalTile<T, BLOCK_T>, written: A and -Y
  uint32_t scratch;  // CausalTile<float, BLOCK_T>, L and the diagonal blocks of Y0 afterwards
  ChunkCoefficients<BLOCK_T>* coef;
};

/// Powers of two that bring numbers of magnitude up to `largest` to the upper range of fp16, and back. `down` stays
/// below 2^61, so that what it scales beside them does not overflow.
struct HalfRange {
  float down = 1.f, up = 1.f;
  __device__ __forceinline__ explicit HalfRange(float largest) {
    constexpr uint32_t kTop = 13;
    const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 80u), 254u);
    down = __uint_as_float((254 + kTop - exponent) << 23);
    up = __uint_as_float((exponent - kTop) << 23);
  }
};

__device__ __forceinline__ float bounded(float x) { return fminf(fmaxf(x, -1e30f), 1e30f); }

/// g as the kernels use it: -inf and below become a decay of e^-88; NaN stays.
__device__ __forceinline__ float clamp_log_decay(float g) { return g < kMinLogDecay ? kMinLogDecay : g; }

template <typename T>
__device__ __forceinline__ void mma_merge(FragC& c, const FragA<float>& a, const FragB<float>& b, bool is_precise) {
  if (sizeof(T) == 4 || is_precise) {
    mma(c, a, b);
  } else {
    // The tensor core truncates, and the errors of a chunk of alike keys would add up: round to nearest instead.
    FragA<float> a_rounded;
    FragB<float> b_rounded;
#pragma unroll
    for (int i = 0; i < 8; ++i) a_rounded.r[i] = tf32_nearest(a.r[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) b_rounded.r[i] = tf32_nearest(b.r[i]);
    mma_tf32(c, a_rounded, b_rounded);
  }
}

/// rstd of rows [row0, row0 + 16) of a tile, from the diagonal of X X^T.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void compute_rstd(uint32_t tile, int row0, float* rstd) {
  FragC gram[2] = {};
#pragma unroll 2
  for (int col = 0; col < HEAD_DIM; col += 16) {
    const FragA<T> x = SmemTile<T, HEAD_DIM>::load_a(tile, row0, col);
    mma(gram[0], x, transposed_half(x, 0));
    mma(gram[1], x, transposed_half(x, 1));
  }
  const int lane_idx = threadIdx.x % 32;
  const int row = lane_idx / 4;
  if (lane_idx % 4 == row / 2) {
    rstd[row0 + row] = rsqrtf((row % 2 ? gram[0].r[1] : gram[0].r[0]) + kNormEpsilon);
    rstd[row0 + row + 8] = rsqrtf((row % 2 ? gram[1].r[3] : gram[1].r[2]) + kNormEpsilon);
  }
}

/// G of the chunk, by one warp.
template <int BLOCK_T>
__device__ __forceinline__ void compute_cumsum(ChunkCoefficients<BLOCK_T>& coef) {
  const int lane_idx = threadIdx.x % 32;
  if constexpr (BLOCK_T == 64) {
    const float first = clamp_log_decay(coef.g[2 * lane_idx]) * kLog2e;
    const float second = clamp_log_decay(coef.g[2 * lane_idx + 1]) * kLog2e;
    // The scan is over pairs, but no token may depend on the second of its own pair.
    const float below = __shfl_up_sync(kFullWarp, warp_inclusive_sum(first + second), 1);
    const float before = lane_idx == 0 ? 0.f : below;
    coef.cumsum[2 * lane_idx] = before + first;
    coef.cumsum[2 * lane_idx + 1] = before + (first + second);
  } else {
    static_assert(BLOCK_T == 32);
    float sum = clamp_log_decay(coef.g[lane_idx]) * kLog2e, rest = 0.f;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const float other = __shfl_up_sync(kFullWarp, sum, delta), other_rest = __shfl_up_sync(kFullWarp, rest, delta);
      const float total = sum + other, part = total - sum;
      const bool has_other = lane_idx >= delta;
      rest += has_other ? other_rest + ((sum - (total - part)) + (other - part)) : 0.f;
      sum = has_other ? total : sum;
    }
    coef.cumsum[lane_idx] = sum;
    coef.g[lane_idx] = rest;
  }
}

/// Row of blocks `row_block` of A (written) and of L (to scratch). TA: of A; half is scaled row by row to the range of
/// fp16 with kScalesA.
template <typename T, int HEAD_DIM, int BLOCK_T, bool kHasQ, typename TA, bool kScalesA>
__device__ __forceinline__ void compute_pair_row(const ChunkTiles<BLOCK_T>& tiles, float scale, int row_block) {
  constexpr int NUM_BLOCKS = BLOCK_T / 16;
  using Tile = SmemTile<T, HEAD_DIM>;
  FragC kk[NUM_BLOCKS][2] = {}, qk[NUM_BLOCKS][2] = {};
#pragma unroll 1
  for (int col = 0; col < HEAD_DIM; col += 16) {
    const FragA<T> k_row = Tile::load_a(tiles.k, row_block * 16, col);
    FragA<T> q_row;
    if constexpr (kHasQ) q_row = Tile::load_a(tiles.q, row_block * 16, col);
    // All loads before the first product, or each product waits for a load of its own.
    FragB<T> k_col[NUM_BLOCKS][2];
#pragma unroll
    for (int j = 0; j < NUM_BLOCKS; ++j) {
      if (j <= row_block) Tile::load_b(k_col[j], tiles.k, j * 16, col);
    }
#pragma unroll
    for (int j = 0; j < NUM_BLOCKS; ++j) {
      if (j > row_block) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma(kk[j][half], k_row, k_col[j][half]);
        if constexpr (kHasQ) mma(qk[j][half], q_row, k_col[j][half]);
      }
    }
  }
  ChunkCoefficients<BLOCK_T>& coef = *tiles.coef;
  const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
  typename ChunkCoefficients<BLOCK_T>::Decay row_decay[2];
  float row_rk[2], row_rq[2], largest[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = row_block * 16 + i * 8 + row;
    row_decay[i] = coef.decay_at(token);
    row_rk[i] = coef.rstd_k[token];
    row_rq[i] = coef.rstd_q[token] * scale;
  }
  const uint32_t first_block = row_block * (row_block + 1) / 2;
#pragma unroll
  for (int j = 0; j < NUM_BLOCKS; ++j) {
    if (j > row_block) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = j * 16 + half * 8 + col;
      const typename ChunkCoefficients<BLOCK_T>::Decay col_decay[2] = {coef.decay_at(token), coef.decay_at(token + 1)};
      const float2 col_rk = *reinterpret_cast<const float2*>(&coef.rstd_k[token]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float rk_j = i % 2 ? col_rk.y : col_rk.x;
        const int distance = row_block * 16 + i / 2 * 8 + row - (token + i % 2);
        float& l = kk[j][half].r[i];
        l = distance > 0 ? l * (row_rk[i / 2] * rk_j) : 0.f;
        if constexpr (kHasQ) {
          float& a = qk[j][half].r[i];
          const float exponent = row_decay[i / 2] - col_decay[i % 2];
          a = distance >= 0 ? a * (row_rq[i / 2] * rk_j * exp2_approx(distance < 0 ? 0.f : exponent)) : 0.f;
          largest[i / 2] = fmaxf(largest[i / 2], fabsf(a));
        }
      }
    }
    SmemBlock<float>::store_c(tiles.scratch + (first_block + j) * SmemBlock<float>::SIZE, kk[j]);
    if constexpr (kHasQ && !kScalesA) SmemBlock<TA>::store_c(tiles.a + (first_block + j) * SmemBlock<TA>::SIZE, qk[j]);
  }
  if constexpr (kHasQ && kScalesA) {
    float down[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const HalfRange range(warp_max<4>(largest[i]));
      down[i] = range.down;
      if (col == 0) coef.a_up[row_block * 16 + i * 8 + row] = range.up;
    }
#pragma unroll
    for (int j = 0; j < NUM_BLOCKS; ++j) {
      if (j > row_block) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) qk[j][half].r[i] *= down[i / 2];
      }
      SmemBlock<TA>::store_c(tiles.a + (first_block + j) * SmemBlock<TA>::SIZE, qk[j]);
    }
  }
}

/// Diagonal blocks `first` and `first` + 1 of Y0 over L in scratch, and of -Y: a half warp each.
template <typename T, int BLOCK_T, bool kTimesBeta>
__device__ __forceinline__ void solve_diagonals(const ChunkTiles<BLOCK_T>& tiles, int first) {
  const ChunkCoefficients<BLOCK_T>& coef = *tiles.coef;
  const int lane_idx = threadIdx.x % 32;
  const int j = first + lane_idx / 16, col = lane_idx % 16;
  const int block_idx = j * (j + 1) / 2 + j;
  const uint32_t block = tiles.scratch + block_idx * SmemBlock<float>::SIZE;
  float y[16], beta_y[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float sum = load_shared(block + SmemBlock<float>::offset(i, col));
#pragma unroll
    for (int m4 = 0; m4 < i; m4 += 4) {
      const float4 l = load_shared_4(block + SmemBlock<float>::offset(i, m4));
#pragma unroll
      for (int m = m4; m < min(m4 + 4, i); ++m) {
        sum -= (m % 4 == 0 ? l.x : m % 4 == 1 ? l.y : m % 4 == 2 ? l.z : l.w) * beta_y[m];
      }
    }
    y[i] = i > col ? sum : 0.f;
    beta_y[i] = i > col ? sum * coef.beta[j * 16 + i] : 0.f;
  }
  __syncwarp();
  const uint32_t out = tiles.y + block_idx * SmemBlock<T>::SIZE;
  const auto col_decay = coef.decay_at(j * 16 + col);
  const float factor = kTimesBeta ? -coef.beta[j * 16 + col] : -1.f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    store_shared(block + SmemBlock<float>::offset(i, col), y[i]);
    const float decay = exp2_approx(i > col ? coef.decay_at(j * 16 + i) - col_decay : 0.f);
    store_shared(out + SmemBlock<T>::offset(i, col), static_cast<T>(i > col ? y[i] * decay * factor : 0.f));
  }
}

/// Blocks of -Y below the diagonal in column of blocks `col_block`.
template <typename T, int BLOCK_T, bool kTimesBeta>
__device__ __forceinline__ void solve_column(const ChunkTiles<BLOCK_T>& tiles, int col_block) {
  constexpr int NUM_BLOCKS = BLOCK_T / 16;
  using Block = SmemBlock<float>;
  const ChunkCoefficients<BLOCK_T>& coef = *tiles.coef;
  const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
  const auto block_index = [](int i, int j) { return static_cast<uint32_t>(i * (i + 1) / 2 + j); };
  const auto scratch = [&](int i, int j) { return tiles.scratch + block_index(i, j) * Block::SIZE; };

  // -(Y0_mj^T diag(beta_m)), rows: columns of block j, columns: tokens of block m
  FragA<float> y_beta[NUM_BLOCKS - 1];
  // Where tokens of the blocks before may reflect the state (beta > 1), errors of the products never fade: 3xTF32.
  bool reflects = false;
  const auto scale_columns = [&](const FragC(&y)[2], int m) {
    FragA<float> a;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 beta = *reinterpret_cast<const float2*>(&coef.beta[m * 16 + half * 8 + col]);
#pragma unroll
      for (int i = 0; i < 4; ++i) a.r[half * 4 + i] = y[half].r[i] * -(i % 2 ? beta.y : beta.x);
    }
    return a;
  };
  typename ChunkCoefficients<BLOCK_T>::Decay col_decay[2];
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    col_decay[i] = coef.decay_at(col_block * 16 + i * 8 + row);
    factor[i] = kTimesBeta ? -coef.beta[col_block * 16 + i * 8 + row] : -1.f;
  }
#pragma unroll 1
  for (int i = col_block; i < NUM_BLOCKS; ++i) {
    FragC x[2];
    Block::load_c_trans(x, scratch(i, col_block));
    if (i > col_block) {
#pragma unroll
      for (int m = 0; m < NUM_BLOCKS - 1; ++m) {
        if (m < col_block || m >= i) continue;
        FragB<float> l[2];
        Block::load_b(l, scratch(i, m));
        mma_merge<T>(x[0], y_beta[m], l[0], reflects);
        mma_merge<T>(x[1], y_beta[m], l[1], reflects);
      }
      FragA<float> x_beta = scale_columns(x, i);
#pragma unroll
      for (int r = 0; r < 8; ++r) x_beta.r[r] = bounded(x_beta.r[r]);
      FragB<float> y_diagonal[2];
      Block::load_b(y_diagonal, scratch(i, i));
      mma_merge<T>(x[0], x_beta, y_diagonal[0], reflects);
      mma_merge<T>(x[1], x_beta, y_diagonal[1], reflects);
    }
    const FragA<float> scaled = scale_columns(x, i);
    reflects |= __any_sync(kFullWarp, coef.beta[i * 16 + threadIdx.x % 16] > 1.f);
#pragma unroll
    for (int m = 0; m < NUM_BLOCKS - 1; ++m) {
      if (m == i) y_beta[m] = scaled;
    }
    if (i == col_block) continue;  // solve_diagonals has stored it
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = i * 16 + half * 8 + col;
      const typename ChunkCoefficients<BLOCK_T>::Decay row_decay[2] = {coef.decay_at(token), coef.decay_at(token + 1)};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        x[half].r[r] *= exp2_approx(row_decay[r % 2] - col_decay[r / 2]) * factor[r / 2];
      }
    }
    SmemBlock<T>::store_c_trans(tiles.y + block_index(i, col_block) * SmemBlock<T>::SIZE, x);
  }
}

/// Norms (of K only without kHasQ) and cumulative gates. K, Q and g must be visible; ends without a barrier.
template <typename T, int HEAD_DIM, int BLOCK_T, int kNumWarps, bool kHasQ>
__device__ __forceinline__ void prepare_norms(const ChunkTiles<BLOCK_T>& tiles, bool use_qk_l2norm, int warp_idx) {
  ChunkCoefficients<BLOCK_T>& coef = *tiles.coef;
  const int thread_idx = warp_idx * 32 + threadIdx.x % 32;
  if (use_qk_l2norm) {
#pragma unroll 1
    for (int i = warp_idx; i < BLOCK_T / 16; i += kNumWarps) {
      compute_rstd<T, HEAD_DIM>(tiles.k, i * 16, coef.rstd_k);
      if constexpr (kHasQ) compute_rstd<T, HEAD_DIM>(tiles.q, i * 16, coef.rstd_q);
    }
  } else {
#pragma unroll
    for (int i = thread_idx; i < BLOCK_T; i += kNumWarps * 32) coef.rstd_k[i] = coef.rstd_q[i] = 1.f;
  }
  if (warp_idx == kNumWarps - 1) compute_cumsum(coef);
}

/// Norms, gates and the coefficients but for beta. Ends visible to its own thread only; K, Q, g and beta must be
/// visible.
template <typename T, int HEAD_DIM, int BLOCK_T, int kNumWarps, bool kHasQ>
__device__ __forceinline__ void prepare_coefficients(const ChunkTiles<BLOCK_T>& tiles, float scale, bool use_qk_l2norm,
                                                     int warp_idx, int barrier_id) {
  ChunkCoefficients<BLOCK_T>& coef = *tiles.coef;
  const int thread_idx = warp_idx * 32 + threadIdx.x % 32;
  prepare_norms<T, HEAD_DIM, BLOCK_T, kNumWarps, kHasQ>(tiles, use_qk_l2norm, warp_idx);
  role_barrier<kNumWarps>(barrier_id);
  const auto last_decay = coef.decay_at(BLOCK_T - 1);
#pragma unroll
  for (int i = thread_idx; i < BLOCK_T; i += kNumWarps * 32) {
    const float cumsum = coef.cumsum[i];
    const float decay = exp2_approx(cumsum);
    coef.k_in[i] = coef.rstd_k[i] * decay;
    coef.k_out[i] = coef.rstd_k[i] * exp2_approx(last_decay - coef.decay_at(i));
    if constexpr (kHasQ) coef.q_in[i] = scale * coef.rstd_q[i] * decay;
  }
}

/// A and L, after prepare_coefficients. Rows of blocks are dealt to the warps back and forth, longest first.
template <typename T, int HEAD_DIM, int BLOCK_T, int kNumWarps, bool kHasQ, typename TA = T, bool kScalesA = false>
__device__ __forceinline__ void prepare_pairs(const ChunkTiles<BLOCK_T>& tiles, float scale, int warp_idx) {
  int turn = warp_idx;
#pragma unroll 1
  for (int row_block = BLOCK_T / 16 - 1 - warp_idx; row_block >= 0;) {
    compute_pair_row<T, HEAD_DIM, BLOCK_T, kHasQ, TA, kScalesA>(tiles, scale, row_block);
    turn = kNumWarps - 1 - turn;
    row_block -= 1 + 2 * turn;
  }
}

/// -Y or -Y diag(beta), stored as TY, from L. The first column is as much work as all the others.
template <typename TY, int BLOCK_T, int kNumWarps, bool kTimesBeta = false>
__device__ __forceinline__ void prepare_inverse(const ChunkTiles<BLOCK_T>& tiles, int warp_idx, int barrier_id) {
#pragma unroll 1
  for (int j = 2 * warp_idx; j < BLOCK_T / 16; j += 2 * kNumWarps) solve_diagonals<TY, BLOCK_T, kTimesBeta>(tiles, j);
  role_barrier<kNumWarps>(barrier_id);
#pragma unroll 1
  for (int col_block = kNumWarps - 1 - warp_idx; col_block + 1 < BLOCK_T / 16;) {
    solve_column<TY, BLOCK_T, kTimesBeta>(tiles, col_block);
    if (warp_idx > 0) break;
    col_block = col_block < kNumWarps ? kNumWarps : col_block + 1;
  }
}

}  // namespace remora
