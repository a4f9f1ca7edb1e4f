// Token by token: the decode step and the recurrent forward pass of one value head over one sequence.
//
// A token costs one pass over the state, which reads it against q and writes e^g S + k v^T: the output follows from the
// old state, o = scale (e^g S^T q + (k . q) v). A single token works on the state where it lies; several work on panels
// of it.
#pragma once
#include <cmath>

#include "recurrence/simple_gla/cpu_walk.h"

namespace remora::REMORA_CPU_ISA::simple_gla {

constexpr int kStepVectors = kNumRegisters / 4;  // columns per pass of a single token, in vectors
constexpr int kStepRows = 4;                     // rows per pass of a single token, value-first

template <class T>
struct StepScratch {
  T *q, *k, *v;  // rows of a chunk
  T* state;      // panels

  StepScratch(const RecurrenceShape& shape, Arena& arena) {
    q = arena.take<T>(kTokens * row_stride(shape.head_dim));
    k = arena.take<T>(kTokens * row_stride(shape.head_dim));
    v = arena.take<T>(kTokens * row_stride(shape.value_dim));
    state = arena.take<T>(panel_rows(shape.head_dim) * padded_columns(shape.value_dim));
  }
};

template <class T>
int64_t step_scratch(const RecurrenceShape& shape) {
  Arena arena(nullptr);
  StepScratch<T> scratch(shape, arena);
  return arena.used();
}

template <class T>
struct StepToken {
  const T *q, *k, *v;  // zero-padded rows
  T decay, qk, scale;

  StepToken(const Rows<T>& q_rows, const Rows<T>& k_rows, const Rows<T>& v_rows, int64_t i, int64_t dims, const T* g,
            T scale_of_call)
      : q(q_rows[i]), k(k_rows[i]), v(v_rows[i]), scale(scale_of_call) {
    Vec<T> product{};
    for (int64_t d = 0; d < dims; d += kWidth<T>) product += load<T>(q + d) * load<T>(k + d);
    qk = sum<T>(product);
    decay = g ? std::exp(*g < kMinGate<T> ? kMinGate<T> : *g) : T(1);
  }
};

/// kVectors vectors of columns of a [dims][stride] state; `v` begins at them.
template <int kVectors, class T>
REMORA_INLINE void step_columns(Vec<T> (&o)[kVectors], const StepToken<T>& token, const T* v, const T* in, T* out,
                                int64_t stride, int64_t dims) {
  constexpr int w = kWidth<T>;
  Vec<T> x[kVectors];
  unroll<kVectors>([&](auto i) REMORA_ALWAYS_INLINE {
    x[i] = load<T>(v + i * w);
    o[i] = Vec<T>{};
  });
  for (int64_t d = 0; d < dims; ++d) {
    const T k = token.k[d], q = token.q[d];
    unroll<kVectors>([&](auto i) REMORA_ALWAYS_INLINE {
      const Vec<T> s = load<T>(in + d * stride + i * w);
      o[i] += s * q;
      if (out) store<T>(out + d * stride + i * w, s * token.decay + x[i] * k);
    });
  }
  unroll<kVectors>([&](auto i) REMORA_ALWAYS_INLINE { o[i] = (o[i] * token.decay + x[i] * token.qk) * token.scale; });
}

/// Rows [0, kRows) of a value-first state [rows][dims]; `v` and `o` begin at them.
template <int kRows, class T, class E>
REMORA_INLINE void step_rows(E* o, const StepToken<T>& token, const T* v, const T* in, T* out, int64_t dims) {
  constexpr int w = kWidth<T>;
  Vec<T> read[kRows] = {};
  const auto rows = [&](int64_t d, const auto& take, const auto& put) REMORA_ALWAYS_INLINE {
    const Vec<T> k = load<T>(token.k + d), q = load<T>(token.q + d);
    unroll<kRows>([&](auto r) REMORA_ALWAYS_INLINE {
      const Vec<T> s = take(in + r * dims + d);
      read[r] += s * q;
      if (out) put(out + r * dims + d, s * token.decay + k * v[r]);
    });
  };
  int64_t d = 0;
  for (; d + w <= dims; d += w) {
    rows(
        d, [](const T* p) REMORA_ALWAYS_INLINE { return load<T>(p); },
        [](T* p, Vec<T> s) REMORA_ALWAYS_INLINE { store<T>(p, s); });
  }
  if (const int64_t left = dims - d; left > 0) {
    rows(
        d, [&](const T* p) REMORA_ALWAYS_INLINE { return load_first<T>(p, left); },
        [&](T* p, Vec<T> s) REMORA_ALWAYS_INLINE { store_first<T>(p, s, left); });
  }
  unroll<kRows>([&](auto r) REMORA_ALWAYS_INLINE {
    store_one<T>(o + r, (sum<T>(read[r]) * token.decay + token.qk * v[r]) * token.scale);
  });
}

/// A single token, on the state where it lies. Returns the first column that is left.
template <class T, class E>
inline int64_t step_in_place(E* o, const StepToken<T>& token, const T* in, T* out, int64_t dims, int64_t columns,
                             bool v_first) {
  int64_t j = 0;
  if (v_first) {
    const auto rows = [&](auto count) REMORA_ALWAYS_INLINE {
      for (; j + count <= columns; j += count) {
        step_rows<count>(o + j, token, token.v + j, in + j * dims, out ? out + j * dims : nullptr, dims);
      }
    };
    rows(std::integral_constant<int, kStepRows>{});
    rows(std::integral_constant<int, 1>{});
    return j;
  }
  const auto vectors = [&](auto count) REMORA_ALWAYS_INLINE {
    constexpr int64_t width = count * kWidth<T>;
    for (; j + width <= columns; j += width) {
      Vec<T> acc[count];
      step_columns<count>(acc, token, token.v + j, in + j, out ? out + j : nullptr, columns, dims);
      unroll<count>([&](auto i) REMORA_ALWAYS_INLINE { store<T>(o + j + i * kWidth<T>, acc[i]); });
    }
  };
  vectors(std::integral_constant<int, kStepVectors>{});
  vectors(std::integral_constant<int, 1>{});
  return j;
}

/// `slot` is the row of the state tensors.
template <class T, class E>
void step(const SimpleGlaStepParams& p, const RecurrenceSequence& sequence, int64_t value_head, int64_t slot,
          void* buffer) {
  const RecurrenceShape& shape = p.shape;
  const int64_t dims = shape.head_dim, columns = shape.value_dim, value_heads = shape.num_value_heads;
  const int64_t head = value_head / (value_heads / shape.num_heads), panel_size = panel_rows(dims) * kPanel<T>;
  const int64_t stride_d = p.state_v_first ? 1 : columns, stride_x = p.state_v_first ? dims : 1;
  const int64_t state = (slot * value_heads + value_head) * dims * columns;
  const T* in = p.initial_state ? static_cast<const T*>(p.initial_state) + state : nullptr;
  T* out = p.final_state ? static_cast<T*>(p.final_state) + state : nullptr;
  if (sequence.length == 0 && in == out) return;
  const HeadTensor<E> q_tensor(p.q, p.q_stride, head, 0, dims), k_tensor(p.k, p.k_stride, head, 0, dims);
  const HeadTensor<E> v_tensor(p.v, p.v_stride, value_head, 0, columns);
  const T* g = p.g ? static_cast<const T*>(p.g) + value_head : nullptr;
  Arena arena(buffer);
  StepScratch<T> scratch(shape, arena);
  const auto load_tokens = [&](const ChunkRows<kTokens>& rows, int64_t tokens) {
    load_rows(scratch.q, q_tensor, rows.at, tokens);
    load_rows(scratch.k, k_tensor, rows.at, tokens);
    load_rows(scratch.v, v_tensor, rows.at, tokens);
  };
  const auto token_at = [&](int64_t i, const TokenRow& row) {
    return StepToken<T>({scratch.q, row_stride(dims)}, {scratch.k, row_stride(dims)}, {scratch.v, row_stride(columns)},
                        i, dims, g ? g + row.row * value_heads : nullptr, static_cast<T>(p.scale));
  };
  const auto output_at = [&](const TokenRow& row) {
    return static_cast<E*>(p.o) + (row.row * value_heads + value_head) * columns;
  };

  int64_t first = 0;  // column
  if (sequence.length == 1 && in) {
    const ChunkRows<kTokens> rows(shape, sequence, 0, 1);
    load_tokens(rows, 1);
    first = step_in_place(output_at(rows.at[0]), token_at(0, rows.at[0]), in, out, dims, columns, p.state_v_first);
    if (first == columns) return;
  }
  const auto lanes_of = [&](int64_t j) { return columns - j; };
  const auto panel_of = [&](int64_t j) { return scratch.state + (j - first) / kPanel<T> * panel_size; };
  for (int64_t j = first; j < columns; j += kPanel<T>) {
    load_panel(panel_of(j), in ? in + j * stride_x : nullptr, dims, lanes_of(j), stride_d, stride_x);
  }
  for (int64_t t = 0; t < sequence.length; t += kTokens) {
    const int64_t tokens = min(kTokens, sequence.length - t);
    const ChunkRows<kTokens> rows(shape, sequence, t, tokens);
    load_tokens(rows, tokens);
    for (int64_t i = 0; i < tokens; ++i) {
      const StepToken<T> token = token_at(i, rows.at[i]);
      for (int64_t j = first; j < columns; j += kPanel<T>) {
        Vec<T> acc[2];
        step_columns<2>(acc, token, token.v + j, panel_of(j), panel_of(j), kPanel<T>, dims);
        store_lanes<T>(output_at(rows.at[i]) + j, acc, lanes_of(j));
      }
    }
  }
  for (int64_t j = first; out && j < columns; j += kPanel<T>) {
    store_panel(panel_of(j), out + j * stride_x, dims, lanes_of(j), stride_d, stride_x);
  }
}

}  // namespace remora::REMORA_CPU_ISA::simple_gla
