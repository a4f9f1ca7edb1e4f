// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include <bit>
#include <cmath>

#include "common/cpu/element_types.h"
#include "common/cpu/simd.h"
#include "common/philox.h"
#include "pkm/sparse_optim/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

int64_t row_at(const SparseUpdateParams& p, int64_t i) {
  return p.rows_are_int64 ? static_cast<const int64_t*>(p.rows)[i] : static_cast<const int32_t*>(p.rows)[i];
}

/// First gradient row at or behind `slot`.
int64_t lower_bound(const SparseUpdateParams& p, int64_t slot, int64_t num_rows) {
  int64_t low = 0, high = num_rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (row_at(p, middle) < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
REMORA_INLINE Vec<T> sqrt(Vec<T> x) {
  for (int i = 0; i < kWidth<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

/// x^n for n >= 0 by squaring: the same products on every device.
inline double power(double x, int64_t n) {
  double y = 1;
  for (; n > 0; n /= 2, x *= x) y = n % 2 ? y * x : y;
  return y;
}

/// Four columns draw one block of the generator; its counter is (row, column / 4, step).
template <class T, class E>
REMORA_INLINE void store_row(const SparseUpdateParams& p, E* dst, int64_t slot, int64_t column, Vec<T> x,
                             int64_t lanes) {
  if constexpr (std::is_same_v<E, BFloat16>) {
    if (p.stochastic_rounding) {
      const uint64_t first = static_cast<uint64_t>(p.column_offset + column);
      for (int64_t i = 0; i < lanes; i += 4) {
        const PhiloxWords random = philox({{static_cast<uint32_t>(slot), static_cast<uint32_t>(slot >> 32),
                                            static_cast<uint32_t>((first + i) / 4), static_cast<uint32_t>(p.step)}},
                                          p.seed);
        for (int64_t j = i; j < std::min(i + 4, lanes); ++j) {
          dst[j].bits = round_bfloat16_stochastically(std::bit_cast<uint32_t>(x[j]), random.word[j - i]);
        }
      }
      return;
    }
  }
  if (lanes == kWidth<T>) {
    store<T>(dst, x);
  } else {
    store_first<T>(dst, x, lanes);
  }
}

template <class T, class E>
REMORA_INLINE Vec<T> load_lanes(const E* p, int64_t lanes) {
  return lanes == kWidth<T> ? load<T>(p) : load_first<T>(p, lanes);
}

/// Calls body(column, lanes) along a row of d columns.
template <class T, class Body>
REMORA_INLINE void each_vector(int64_t dim, const Body& body) {
  for (int64_t c = 0; c < dim; c += kWidth<T>) body(c, std::min<int64_t>(kWidth<T>, dim - c));
}

template <class T, class G>
REMORA_INLINE T mean_square(const G* g, int64_t dim, T scale) {
  Vec<T> squares{};
  each_vector<T>(dim, [&](int64_t c, int64_t lanes) REMORA_ALWAYS_INLINE {
    const Vec<T> x = load_lanes<T>(g + c, lanes) * scale;
    squares += x * x;
  });
  return sum<T>(squares) / static_cast<T>(dim);
}

/// One row; `g` is null where its gradient is zero.
template <class T, class E, class G, SparseRule kRule>
void update_row(const SparseUpdateParams& p, int64_t slot, const G* g, T scale) {
  const int64_t dim = p.dim();
  T decay = static_cast<T>(p.decay), missed1 = 1, missed2 = 1;
  if (p.mode == SparseMode::kCatchUp) {
    const int64_t missed = std::max<int64_t>(0, p.step - 1 - p.last_step[slot]);
    missed1 = static_cast<T>(power(p.beta1, missed)), missed2 = static_cast<T>(power(p.beta2, missed));
    decay = static_cast<T>(p.decay * std::exp(p.log_decay - p.row_log_decay[slot]));
    p.last_step[slot] = static_cast<int32_t>(p.step);
    p.row_log_decay[slot] = p.log_decay + std::log(p.decay);
  }
  const T keep1 = static_cast<T>(p.beta1), new1 = static_cast<T>(1 - p.beta1);
  const T keep2 = static_cast<T>(p.beta2), new2 = static_cast<T>(1 - p.beta2);
  const T step_size = static_cast<T>(p.step_size), second_scale = static_cast<T>(p.second_scale);
  const T eps = static_cast<T>(p.eps);
  T row_rate = 0;  // of the row-wise rules: step size over the root of the second moment
  if constexpr (kRule != SparseRule::kAdam) {
    T& second = static_cast<T*>(p.second)[slot];
    const T square = g ? mean_square<T>(g, dim, scale) : T{0};
    second = kRule == SparseRule::kRowwiseAdagrad ? second + square : keep2 * (second * missed2) + new2 * square;
    row_rate = step_size / (std::sqrt(second) * second_scale + eps);
  }
  E* weight = static_cast<E*>(p.table) + slot * dim;
  T* moment = static_cast<T*>(p.moment) + (kRule == SparseRule::kRowwiseAdagrad ? 0 : slot * dim);
  T* second = static_cast<T*>(p.second) + (kRule == SparseRule::kAdam ? slot * dim : 0);
  each_vector<T>(dim, [&](int64_t c, int64_t lanes) REMORA_ALWAYS_INLINE {
    const Vec<T> gradient = g ? load_lanes<T>(g + c, lanes) * scale : Vec<T>{};
    Vec<T> x = load_lanes<T>(weight + c, lanes) * decay;
    if constexpr (kRule == SparseRule::kRowwiseAdagrad) {
      x -= row_rate * gradient;
    } else {
      const Vec<T> m = keep1 * (load_lanes<T>(moment + c, lanes) * missed1) + new1 * gradient;
      lanes == kWidth<T> ? store<T>(moment + c, m) : store_first<T>(moment + c, m, lanes);
      if constexpr (kRule == SparseRule::kAdam) {
        const Vec<T> v = keep2 * (load_lanes<T>(second + c, lanes) * missed2) + new2 * (gradient * gradient);
        lanes == kWidth<T> ? store<T>(second + c, v) : store_first<T>(second + c, v, lanes);
        x -= step_size * m / (sqrt<T>(v) * second_scale + eps);
      } else {
        x -= row_rate * m;
      }
    }
    store_row<T>(p, weight + c, slot, c, x, lanes);
  });
}

template <class T, class E, class G, SparseRule kRule>
void update_block(const SparseUpdateParams& p, int64_t block, int64_t num_rows) {
  const G* values = static_cast<const G*>(p.gradient.values);
  const T scale = p.grad_scale ? static_cast<T>(*p.grad_scale) : T{1};
  const int64_t begin = block * kSparseBlockRows;
  if (p.mode == SparseMode::kDense) {
    int64_t i = lower_bound(p, begin, num_rows);
    for (int64_t slot = begin; slot < std::min(begin + kSparseBlockRows, p.num_slots); ++slot) {
      while (i < num_rows && row_at(p, i) < slot) ++i;
      const bool has_gradient = i < num_rows && row_at(p, i) == slot;
      update_row<T, E, G, kRule>(p, slot, has_gradient ? values + i * p.dim() : nullptr, scale);
    }
    return;
  }
  for (int64_t i = begin; i < std::min(begin + kSparseBlockRows, num_rows); ++i) {
    const int64_t slot = row_at(p, i);
    if (slot >= 0 && slot < p.num_slots) update_row<T, E, G, kRule>(p, slot, values + i * p.dim(), scale);
  }
}

template <class T, class E, class G>
void update_values(const SparseUpdateParams& p, int64_t block, int64_t num_rows) {
  switch (p.rule) {
    case SparseRule::kAdam:
      return update_block<T, E, G, SparseRule::kAdam>(p, block, num_rows);
    case SparseRule::kRowwiseAdam:
      return update_block<T, E, G, SparseRule::kRowwiseAdam>(p, block, num_rows);
    case SparseRule::kRowwiseAdagrad:
      return update_block<T, E, G, SparseRule::kRowwiseAdagrad>(p, block, num_rows);
  }
}

template <class T, class E>
void update(const SparseUpdateParams& p, int64_t block, int64_t num_rows) {
  if (p.gradient.dtype == p.dtype) {
    update_values<T, E, E>(p, block, num_rows);
  } else if constexpr (!std::is_same_v<T, E>) {
    update_values<T, E, T>(p, block, num_rows);
  }
}

template <class T, class E>
void sum_of_squares(const RowNormParams& p, int64_t block, int64_t num_rows) {
  const int64_t dim = p.gradient.dim, begin = block * kSparseBlockRows;
  double total = 0;
  for (int64_t i = begin; i < std::min(begin + kSparseBlockRows, num_rows); ++i) {
    Vec<T> squares{};
    each_vector<T>(dim, [&](int64_t c, int64_t lanes) REMORA_ALWAYS_INLINE {
      const Vec<T> x = load_lanes<T>(static_cast<const E*>(p.gradient.values) + i * dim + c, lanes);
      squares += x * x;
    });
    total += static_cast<double>(sum<T>(squares));
  }
  static_cast<double*>(p.workspace)[block] = total;
}

template <class T>
void norm(const RowNormParams& p, int64_t num_blocks) {
  double total = 0;
  for (int64_t block = 0; block < num_blocks; ++block) total += static_cast<const double*>(p.workspace)[block];
  *static_cast<T*>(p.norm) = static_cast<T>(std::sqrt(total));
}

template <class T, class E>
constexpr SparseOptimCpuKernels kKernels = {update<T, E>, sum_of_squares<T, E>, norm<T>};

}  // namespace

const SparseOptimCpuKernels& sparse_optim_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
