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
#pragma once
#include "common/barrier.cuh"
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

__device__ __forceinline__ float bounded(float x) { return fminf(fmaxf(x, -1e30f), 1e30f); }

/// g as the kernels use it: -inf and below become a decay of e^-88; NaN stays.
__device__ __forceinline__ float clamp_log_decay(float g) { return g < kMinLogDecay ? kMinLogDecay : g; }

template <typename T>
__device__ __forceinline__ void mma_merge(FragC& c, const FragA<float>& a, const FragB<float>& b) {
  if constexpr (sizeof(T) == 4) {
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
#pragma unroll
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

/// Row of blocks kRow of A (written) and of L (to scratch).
template <typename T, int HEAD_DIM, int BLOCK_T, bool kHasQ, int kRow>
__device__ __forceinline__ void compute_pair_row(const ChunkTiles<BLOCK_T>& tiles, float scale, bool use_qk_l2norm) {
  using Tile = SmemTile<T, HEAD_DIM>;
  using Causal = CausalTile<T, BLOCK_T>;
  FragC kk[kRow + 1][2] = {}, qk[kRow + 1][2] = {};
#pragma unroll
  for (int col = 0; col < HEAD_DIM; col += 16) {
    const FragA<T> k_row = Tile::load_a(tiles.k, kRow * 16, col);
    FragA<T> q_row;
    if constexpr (kHasQ) q_row = Tile::load_a(tiles.q, kRow * 16, col);
#pragma unroll
    for (int j = 0; j <= kRow; ++j) {
      FragB<T> k_col[2];
      if (j == kRow) {
        k_col[0] = transposed_half(k_row, 0);
        k_col[1] = transposed_half(k_row, 1);
      } else {
        Tile::load_b(k_col, tiles.k, j * 16, col);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma(kk[j][half], k_row, k_col[half]);
        if constexpr (kHasQ) mma(qk[j][half], q_row, k_col[half]);
      }
    }
  }
  const ChunkCoefficients<BLOCK_T>& coef = *tiles.coef;
  const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
  typename ChunkCoefficients<BLOCK_T>::Decay row_decay[2];
  float row_rk[2], row_rq[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = kRow * 16 + i * 8 + row;
    row_decay[i] = coef.decay_at(token);
    row_rk[i] = coef.rstd_k[token];
    row_rq[i] = coef.rstd_q[token];
  }
#pragma unroll
  for (int j = 0; j <= kRow; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = j * 16 + half * 8 + col;
      const typename ChunkCoefficients<BLOCK_T>::Decay col_decay[2] = {coef.decay_at(token), coef.decay_at(token + 1)};
      const float2 col_rk = *reinterpret_cast<const float2*>(&coef.rstd_k[token]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float rk_j = i % 2 ? col_rk.y : col_rk.x;
        const int distance = kRow * 16 + i / 2 * 8 + row - (token + i % 2);
        float& l = kk[j][half].r[i];
        if (use_qk_l2norm) l *= row_rk[i / 2] * rk_j;
        if (j == kRow) l = distance > 0 ? l : 0.f;
        if constexpr (kHasQ) {
          float& a = qk[j][half].r[i];
          const float exponent = row_decay[i / 2] - col_decay[i % 2];
          a *= scale * exp2_approx(j == kRow && distance < 0 ? 0.f : exponent);
          if (use_qk_l2norm) a *= row_rq[i / 2] * rk_j;
          if (j == kRow) a = distance >= 0 ? a : 0.f;
        }
      }
    }
    SmemBlock<float>::store_c(tiles.scratch + CausalTile<float, BLOCK_T>::block(kRow, j), kk[j]);
    if constexpr (kHasQ) SmemBlock<T>::store_c(tiles.a + Causal::block(kRow, j), qk[j]);
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

/// Blocks of -Y below the diagonal in column of blocks kCol.
template <typename T, int BLOCK_T, bool kTimesBeta, int kCol>
__device__ __forceinline__ void solve_column(const ChunkTiles<BLOCK_T>& tiles) {
  constexpr int NUM_BLOCKS = BLOCK_T / 16;
  using Scratch = CausalTile<float, BLOCK_T>;
  using Block = SmemBlock<float>;
  const ChunkCoefficients<BLOCK_T>& coef = *tiles.coef;
  const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;

  // -(Y0_mj^T diag(beta_m)), rows: columns of block j, columns: tokens of block m
  FragA<float> y_beta[NUM_BLOCKS];
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

  FragC y[2];
  Block::load_c_trans(y, tiles.scratch + Scratch::block(kCol, kCol));
  y_beta[kCol] = scale_columns(y, kCol);
  typename ChunkCoefficients<BLOCK_T>::Decay col_decay[2];
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    col_decay[i] = coef.decay_at(kCol * 16 + i * 8 + row);
    factor[i] = kTimesBeta ? -coef.beta[kCol * 16 + i * 8 + row] : -1.f;
  }
#pragma unroll
  for (int i = kCol + 1; i < NUM_BLOCKS; ++i) {
    FragC x[2];
    Block::load_c_trans(x, tiles.scratch + Scratch::block(i, kCol));
#pragma unroll
    for (int m = kCol; m < i; ++m) {
      FragB<float> l[2];
      Block::load_b(l, tiles.scratch + Scratch::block(i, m));
      mma_merge<T>(x[0], y_beta[m], l[0]);
      mma_merge<T>(x[1], y_beta[m], l[1]);
    }
    FragA<float> x_beta = scale_columns(x, i);
#pragma unroll
    for (int r = 0; r < 8; ++r) x_beta.r[r] = bounded(x_beta.r[r]);
    FragB<float> y_diagonal[2];
    Block::load_b(y_diagonal, tiles.scratch + Scratch::block(i, i));
    mma_merge<T>(x[0], x_beta, y_diagonal[0]);
    mma_merge<T>(x[1], x_beta, y_diagonal[1]);
    if (i + 1 < NUM_BLOCKS) y_beta[i] = scale_columns(x, i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = i * 16 + half * 8 + col;
      const typename ChunkCoefficients<BLOCK_T>::Decay row_decay[2] = {coef.decay_at(token), coef.decay_at(token + 1)};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        x[half].r[r] *= exp2_approx(row_decay[r % 2] - col_decay[r / 2]) * factor[r / 2];
      }
    }
    SmemBlock<T>::store_c_trans(tiles.y + CausalTile<T, BLOCK_T>::block(i, kCol), x);
  }
}

/// Warp that computes row of blocks `row`: dealt back and forth, longest first.
constexpr int pair_row_owner(int row, int num_blocks, int num_warps) {
  const int turn = (num_blocks - 1 - row) % (2 * num_warps);
  return turn < num_warps ? turn : 2 * num_warps - 1 - turn;
}

/// Warp that solves column of blocks `col`: the first column is as much work as all the others.
constexpr int column_owner(int col, int num_warps) { return col < num_warps ? num_warps - 1 - col : 0; }

/// Norms, gates and the coefficients but for beta. Ends visible to its own thread only; K, Q, g and beta must be
/// visible.
template <typename T, int HEAD_DIM, int BLOCK_T, int kNumWarps, bool kHasQ>
__device__ __forceinline__ void prepare_coefficients(const ChunkTiles<BLOCK_T>& tiles, float scale, bool use_qk_l2norm,
                                                     int warp_idx, int barrier_id) {
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

/// A and L, after prepare_coefficients.
template <typename T, int HEAD_DIM, int BLOCK_T, int kNumWarps, bool kHasQ, int kRow = BLOCK_T / 16 - 1>
__device__ __forceinline__ void prepare_pairs(const ChunkTiles<BLOCK_T>& tiles, float scale, bool use_qk_l2norm,
                                              int warp_idx) {
  if (warp_idx == pair_row_owner(kRow, BLOCK_T / 16, kNumWarps)) {
    compute_pair_row<T, HEAD_DIM, BLOCK_T, kHasQ, kRow>(tiles, scale, use_qk_l2norm);
  }
  if constexpr (kRow > 0) {
    prepare_pairs<T, HEAD_DIM, BLOCK_T, kNumWarps, kHasQ, kRow - 1>(tiles, scale, use_qk_l2norm, warp_idx);
  }
}

template <typename T, int BLOCK_T, int kNumWarps, bool kTimesBeta, int kCol = 0>
__device__ __forceinline__ void solve_columns(const ChunkTiles<BLOCK_T>& tiles, int warp_idx) {
  if constexpr (kCol + 1 < BLOCK_T / 16) {
    if (warp_idx == column_owner(kCol, kNumWarps)) solve_column<T, BLOCK_T, kTimesBeta, kCol>(tiles);
    solve_columns<T, BLOCK_T, kNumWarps, kTimesBeta, kCol + 1>(tiles, warp_idx);
  }
}

/// -Y or -Y diag(beta), stored as TY, from L.
template <typename TY, int BLOCK_T, int kNumWarps, bool kTimesBeta = false>
__device__ __forceinline__ void prepare_inverse(const ChunkTiles<BLOCK_T>& tiles, int warp_idx, int barrier_id) {
#pragma unroll 1
  for (int j = 2 * warp_idx; j < BLOCK_T / 16; j += 2 * kNumWarps) solve_diagonals<TY, BLOCK_T, kTimesBeta>(tiles, j);
  role_barrier<kNumWarps>(barrier_id);
  solve_columns<TY, BLOCK_T, kNumWarps, kTimesBeta>(tiles, warp_idx);
}

/// Everything above for one chunk, by kNumWarps warps that share barrier `barrier_id`. K, Q, g and beta must be visible
/// to all of them; what it writes is visible to its own warp only, until the next barrier. Without kHasQ neither
/// Q nor A is touched. Y is stored as TY.
template <typename T, int HEAD_DIM, int BLOCK_T, int kNumWarps, bool kHasQ = true, typename TY = T>
__device__ __forceinline__ void prepare_chunk(const ChunkTiles<BLOCK_T>& tiles, float scale, bool use_qk_l2norm,
                                              int warp_idx, int barrier_id) {
  prepare_coefficients<T, HEAD_DIM, BLOCK_T, kNumWarps, kHasQ>(tiles, scale, use_qk_l2norm, warp_idx, barrier_id);
  prepare_pairs<T, HEAD_DIM, BLOCK_T, kNumWarps, kHasQ>(tiles, scale, use_qk_l2norm, warp_idx);
  role_barrier<kNumWarps>(barrier_id);
  prepare_inverse<TY, BLOCK_T, kNumWarps>(tiles, warp_idx, barrier_id);
}

}  // namespace remora
