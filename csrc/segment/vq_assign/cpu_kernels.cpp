// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
//
// The nearest code has the smallest |c|^2 / 2 - <x, c>. Codes are packed in panels one vector wide, so that a chunk of
// tokens meets a panel in the products of common/cpu/microkernel.h; the best code of every lane is kept.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/cpu/arena.h"
#include "common/cpu/element_types.h"
#include "common/cpu/functions.h"
#include "common/cpu/microkernel.h"
#include "segment/vq_assign/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

template <class T>
using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T>
int64_t num_panels(const VqAssignParams& p) {
  return (p.codes + kWidth<T> - 1) / kWidth<T>;
}

/// Of every head the halves of squares [panels][width], infinite behind the last code, then the panels
/// [panels][pad(D)][width].
template <class T>
struct Packed {
  T *halves, *panels;

  Packed(const VqAssignParams& p, int64_t head) {
    const int64_t width = num_panels<T>(p) * kWidth<T>;
    halves = static_cast<T*>(p.workspace) + head * width * (1 + pad(p.dims));
    panels = halves + width;
  }
};

template <class T>
int64_t workspace(const VqAssignParams& p) {
  return p.heads * num_panels<T>(p) * kWidth<T> * (1 + pad(p.dims)) * static_cast<int64_t>(sizeof(T));
}

template <class T, class E>
void pack(const VqAssignParams& p, int64_t head, int64_t panel) {
  constexpr int w = kWidth<T>;
  const Packed<T> to(p, head);
  T* const columns = to.panels + panel * pad(p.dims) * w;
  std::fill_n(columns, pad(p.dims) * w, T(0));
  for (int64_t lane = 0; lane < w; ++lane) {
    const int64_t code = panel * w + lane;
    T half = std::numeric_limits<T>::infinity();
    if (code < p.codes) {
      const E* from = static_cast<const E*>(p.codebook) + (head * p.codes + code) * p.dims;
      half = 0;
      for (int64_t d = 0; d < p.dims; ++d) {
        const T x = load_one<T>(from + d);
        columns[d * w + lane] = x;
        half += x * x / 2;
      }
    }
    to.halves[panel * w + lane] = half;
  }
}

template <class T, class E>
struct Scratch {
  T *operand, *best;   // [pad(D)][kChunk], [kChunk][width]
  Index<T>* best_idx;  // [kChunk][width]
  E* copy;

  Scratch(const VqAssignParams& p, Arena& arena)
      : operand(arena.take<T>(pad(p.dims) * kChunk)),
        best(arena.take<T>(kChunk * kWidth<T>)),
        best_idx(arena.take<Index<T>>(kChunk * kWidth<T>)),
        copy(arena.take<E>(operand_copy_size(p.dims))) {}
};

template <class T, class E>
int64_t scratch_bytes(const VqAssignParams& p) {
  Arena arena(nullptr);
  Scratch<T, E> scratch(p, arena);
  return arena.used();
}

template <class T, class E>
void assign(const VqAssignParams& p, int64_t batch, int64_t head, int64_t first, void* buffer) {
  constexpr int w = kWidth<T>;
  Arena arena(buffer);
  const Scratch<T, E> s(p, arena);
  const Packed<T> packed(p, head);
  const int64_t tokens = std::min<int64_t>(kChunk, p.tokens - first), padded = pad(p.dims);
  const E* x = static_cast<const E*>(p.x) + p.x_offset(batch, head, first);
  // Rows behind the last are not read but need an address.
  Tile<E> rows;
  for (int64_t i = 0; i < kChunk; ++i) rows.row[i] = x + std::min(i, tokens - 1) * p.x_stride_token;
  load_operand<Multiply<T>>(s.operand, rows, tokens, p.dims, s.copy);
  std::fill_n(s.best, kChunk * w, std::numeric_limits<T>::infinity());
  std::fill_n(s.best_idx, kChunk * w, Index<T>(-1));
  Vec<Index<T>> codes;
  for (int lane = 0; lane < w; ++lane) codes[lane] = lane;
  for (int64_t panel = 0; panel < num_panels<T>(p); ++panel) {
    Vec<T> acc[kChunk];
    multiply<Multiply<T>>(acc, s.operand, packed.panels + panel * padded * w, w, padded);
    const Vec<T> half = load<T>(packed.halves + panel * w);
    unroll<kChunk>([&](auto i) REMORA_ALWAYS_INLINE {
      const Vec<T> score = half - acc[i], best = load<T>(s.best + i * w);
      const auto is_nearer = score < best;
      store<T>(s.best + i * w, is_nearer ? score : best);
      store<Index<T>>(s.best_idx + i * w, is_nearer ? codes : load<Index<T>>(s.best_idx + i * w));
    });
    codes += w;
  }
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t to = (batch * p.heads + head) * p.tokens + first + i;
    if (p.mask && !p.mask[batch * p.tokens + first + i]) {
      p.idx[to] = -1, static_cast<T*>(p.err2)[to] = 0;
      continue;
    }
    T score = std::numeric_limits<T>::infinity();
    int64_t code = 0;  // of a token without a nearest one, as NaN has none
    for (int lane = 0; lane < w; ++lane) {
      const T of_lane = s.best[i * w + lane];
      const int64_t index = s.best_idx[i * w + lane];
      if (index >= 0 && (of_lane < score || (of_lane == score && index < code))) score = of_lane, code = index;
    }
    const E* of_code = static_cast<const E*>(p.codebook) + (head * p.codes + code) * p.dims;
    Vec<T> squares{};
    for (int64_t d = 0; d < p.dims; d += w) {
      const Vec<T> gap = load_lanes<T>(rows.row[i], d, p.dims) - load_lanes<T>(of_code, d, p.dims);
      squares += gap * gap;
    }
    p.idx[to] = static_cast<int32_t>(code), static_cast<T*>(p.err2)[to] = sum<T>(squares);
  }
}

template <class T, class E>
constexpr VqAssignCpuKernels kKernels = {kChunk,     kWidth<T>,   workspace<T>, scratch_bytes<T, E>,
                                         pack<T, E>, assign<T, E>};

}  // namespace

const VqAssignCpuKernels& vq_assign_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
