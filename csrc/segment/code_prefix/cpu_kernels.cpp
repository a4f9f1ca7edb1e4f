// The kernels of one instruction set; compiled once for each (cmake/CpuIsa.cmake).
#include <algorithm>
#include <cmath>

#include "common/cpu/arena.h"
#include "common/cpu/element_types.h"
#include "common/cpu/functions.h"
#include "segment/code_prefix/cpu.h"

namespace remora::REMORA_CPU_ISA {
namespace {

constexpr int64_t kChannels = kCodePrefixChannels;

template <class T>
struct Scratch {
  T *sums, *counts;  // [S, kChannels], [S]

  Scratch(const CodePrefixShape& shape, Arena& arena)
      : sums(arena.take<T>(shape.codes * kChannels)), counts(arena.take<T>(shape.codes)) {}
};

template <class T>
int64_t scratch_bytes(const CodePrefixShape& shape) {
  Arena arena(nullptr);
  Scratch<T> scratch(shape, arena);
  return arena.used();
}

template <class T, class E>
void fwd(const CodePrefixFwdParams& p, int64_t row, int64_t channel_block, void* buffer) {
  const CodePrefixShape& shape = p.shape;
  const int64_t S = shape.codes, D = shape.channels, first = channel_block * kChannels;
  const int64_t lanes = std::min(kChannels, D - first);
  const T* initial_mean = static_cast<const T*>(p.initial_mean);
  const T* initial_count = static_cast<const T*>(p.initial_count);
  Arena arena(buffer);
  const Scratch<T> s(shape, arena);
  for (int64_t code = 0; code < S; ++code) {
    s.counts[code] = initial_count ? initial_count[row * S + code] : T(0);
    for (int64_t c = 0; c < lanes; c += kWidth<T>) {
      const Vec<T> mean =
          initial_mean ? load_lanes<T>(initial_mean + (row * S + code) * D + first, c, lanes) : Vec<T>{};
      store<T>(s.sums + code * kChannels + c, mean * s.counts[code]);
    }
  }
  const auto write = [&](auto* mean, int64_t at) {
    for (int64_t code = 0; code < S; ++code) {
      const T scale = s.counts[code] > 0 ? 1 / s.counts[code] : T(0);
      for (int64_t c = 0; c < lanes; c += kWidth<T>) {
        store_lanes<T>(mean + (at * S + code) * D + first, c, lanes, load<T>(s.sums + code * kChannels + c) * scale);
      }
    }
  };
  for (int64_t border = 0; border < shape.borders(); ++border) {
    const int64_t at = row * shape.borders() + border;
    write(static_cast<E*>(p.mean), at);
    for (int64_t code = 0; channel_block == 0 && code < S; ++code) {
      static_cast<T*>(p.log_count)[at * S + code] = std::log(s.counts[code]);
    }
    for (int64_t t = border * shape.chunk; t < std::min(shape.tokens, (border + 1) * shape.chunk); ++t) {
      const int64_t code = p.idx[row * shape.tokens + t];
      if (code < 0 || code >= S) continue;
      s.counts[code] += 1;
      const E* v = static_cast<const E*>(p.v) + shape.v_offset(row, t) + first;
      T* const sum = s.sums + code * kChannels;
      for (int64_t c = 0; c < lanes; c += kWidth<T>) store<T>(sum + c, load<T>(sum + c) + load_lanes<T>(v, c, lanes));
    }
  }
  write(static_cast<T*>(p.final_mean), row);
  if (channel_block == 0) std::copy_n(s.counts, S, static_cast<T*>(p.final_count) + row * S);
}

template <class T, class E>
void bwd(const CodePrefixBwdParams& p, int64_t row, int64_t channel_block, void* buffer) {
  const CodePrefixShape& shape = p.shape;
  const int64_t S = shape.codes, D = shape.channels, first = channel_block * kChannels;
  const int64_t lanes = std::min(kChannels, D - first);
  Arena arena(buffer);
  const Scratch<T> s(shape, arena);  // sums: gradient of a value that comes before what was walked
  std::copy_n(static_cast<const T*>(p.final_count) + row * S, S, s.counts);
  std::fill_n(s.sums, S * kChannels, T(0));
  const auto add = [&](const auto* d_mean, int64_t at) {
    for (int64_t code = 0; code < S; ++code) {
      if (!(s.counts[code] > 0)) continue;
      T* const sum = s.sums + code * kChannels;
      for (int64_t c = 0; c < lanes; c += kWidth<T>) {
        const Vec<T> d = load_lanes<T>(d_mean + (at * S + code) * D + first, c, lanes);
        store<T>(sum + c, load<T>(sum + c) + d / s.counts[code]);
      }
    }
  };
  if (p.d_final_mean) add(static_cast<const T*>(p.d_final_mean), row);
  for (int64_t border = shape.borders() - 1; border >= 0; --border) {
    for (int64_t t = border * shape.chunk; t < std::min(shape.tokens, (border + 1) * shape.chunk); ++t) {
      const int64_t code = p.idx[row * shape.tokens + t];
      const bool has_code = code >= 0 && code < S;
      if (has_code) s.counts[code] -= 1;
      E* const dv = static_cast<E*>(p.dv) + (row * shape.tokens + t) * D + first;
      for (int64_t c = 0; c < lanes; c += kWidth<T>) {
        store_lanes<T>(dv, c, lanes, has_code ? load<T>(s.sums + code * kChannels + c) : Vec<T>{});
      }
    }
    add(static_cast<const E*>(p.d_mean), row * shape.borders() + border);
  }
  for (int64_t code = 0; p.d_initial_mean && code < S; ++code) {
    const T count = static_cast<const T*>(p.initial_count)[row * S + code];
    T* const to = static_cast<T*>(p.d_initial_mean) + (row * S + code) * D + first;
    for (int64_t c = 0; c < lanes; c += kWidth<T>) {
      store_lanes<T>(to, c, lanes, load<T>(s.sums + code * kChannels + c) * count);
    }
  }
}

template <class T, class E>
constexpr CodePrefixCpuKernels kKernels = {scratch_bytes<T>, fwd<T, E>, bwd<T, E>};

}  // namespace

const CodePrefixCpuKernels& code_prefix_kernels(DType dtype) {
  return with_element_types(dtype, []<class T, class E>() -> const auto& { return kKernels<T, E>; });
}

}  // namespace remora::REMORA_CPU_ISA
