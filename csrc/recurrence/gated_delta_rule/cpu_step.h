// Token by token: the decode step and the recurrent forward pass of one value head over one sequence.
//
// A token costs two passes over the state: one reads it against k and q at once (the output needs the updated state,
// S'^T q = a S^T q + (k . q) u), one writes a S + k u^T. A single token works on the state where it lies; several work
// on panels of it small enough for L1.
#pragma once
#include <cmath>

#include "recurrence/gated_delta_rule/cpu.h"
#include "recurrence/gated_delta_rule/cpu_chunk.h"

namespace remora::REMORA_CPU_ISA {

constexpr int kStepVectors = 8;       // columns per pass of a single token, in vectors
constexpr int kRecurrentVectors = 2;  // columns of a panel that stays in L1

/// Rows per pass of a single token, value-first: their products with k and with q fill the rows of one transpose.
template <class T>
constexpr int kStepRows = kWidth<T> / 2;

/// One token: its key and query in T, normalised, and its gate.
template <class T>
struct StepToken {
  T *q, *k;  // [pad(dims)]
  T decay, beta, qk;
};

template <class T>
struct StepScratch {
  StepToken<T> token;
  T* panel;  // [dims][kRecurrentVectors * width]

  StepScratch(const RecurrenceShape& shape, Arena& arena) {
    token.q = arena.take<T>(pad(shape.head_dim));
    token.k = arena.take<T>(pad(shape.head_dim));
    panel = arena.take<T>(shape.head_dim * kRecurrentVectors * kWidth<T>);
  }
};

template <class T>
int64_t step_scratch(const RecurrenceShape& shape) {
  Arena arena(nullptr);
  StepScratch<T> scratch(shape, arena);
  return arena.used();
}

/// Columns [0, kVectors * width) of a [dims][stride] state.
template <int kVectors, class T>
REMORA_INLINE void step_columns(const StepToken<T>& token, const T* in, int64_t in_stride, T* out, int64_t out_stride,
                                int64_t dims, const Vec<T> (&v)[kVectors], Vec<T> (&o)[kVectors], T scale) {
  constexpr int w = kWidth<T>;
  Vec<T> key_read[kVectors] = {}, query_read[kVectors] = {};
  for (int64_t d = 0; d < dims; ++d) {
    const T k = token.k[d], q = token.q[d];
    unroll<kVectors>([&](auto i) REMORA_ALWAYS_INLINE {
      const Vec<T> s = load<T>(in + d * in_stride + i * w);
      key_read[i] += s * k;
      query_read[i] += s * q;
    });
  }
  unroll<kVectors>([&](auto i) REMORA_ALWAYS_INLINE {
    const Vec<T> u = (v[i] - key_read[i] * token.decay) * token.beta;
    o[i] = (query_read[i] * token.decay + u * token.qk) * scale;
    key_read[i] = u;
  });
  if (!out) return;
  for (int64_t d = 0; d < dims; ++d) {
    const T k = token.k[d];
    unroll<kVectors>([&](auto i) REMORA_ALWAYS_INLINE {
      const Vec<T> s = load<T>(in + d * in_stride + i * w);
      store<T>(out + d * out_stride + i * w, s * token.decay + key_read[i] * k);
    });
  }
}

/// The columns from `first` on that fill kVectors vectors. Returns the first that is left.
template <int kVectors, class T, class E>
REMORA_INLINE int64_t step_blocks(const StepToken<T>& token, const T* in, T* out, int64_t dims, int64_t columns,
                                  int64_t first, const E* v, E* o, T scale) {
  constexpr int w = kWidth<T>;
  for (; first + kVectors * w <= columns; first += kVectors * w) {
    Vec<T> v_vectors[kVectors], o_vectors[kVectors];
    unroll<kVectors>([&](auto i) REMORA_ALWAYS_INLINE { v_vectors[i] = load<T>(v + first + i * w); });
    step_columns<kVectors>(token, in + first, columns, out ? out + first : nullptr, columns, dims, v_vectors, o_vectors,
                           scale);
    unroll<kVectors>([&](auto i) REMORA_ALWAYS_INLINE { store<T>(o + first + i * w, o_vectors[i]); });
  }
  return first;
}

/// Rows [0, rows <= kStepRows) of a value-first state [rows][dims].
template <bool kWhole, class T, class E>
REMORA_INLINE void step_rows(const StepToken<T>& token, const T* in, T* out, int64_t dims, int64_t rows, const E* v,
                             E* o, T scale) {
  constexpr int w = kWidth<T>, n = kStepRows<T>;
  const auto row = [&](int64_t r, int64_t d) REMORA_ALWAYS_INLINE {
    if constexpr (kWhole) return load<T>(in + r * dims + d);
    return r < rows ? load_first<T>(in + r * dims + d, min(w, dims - d)) : Vec<T>{};
  };
  // Row after row: the state is read in the order of its addresses, which the processor's prefetcher follows.
  Vec<T> read[2 * n] = {};  // against k, then against q
  unroll<n>([&](auto r) REMORA_ALWAYS_INLINE {
    for (int64_t d = 0; d < dims; d += w) {
      const Vec<T> s = row(r, d);
      read[r] += s * load<T>(token.k + d);
      read[n + r] += s * load<T>(token.q + d);
    }
  });
  const Vec<T> sums = sum_rows(read);
  T u[n], sum[w];
  store<T>(sum, sums);
  for (int64_t r = 0; r < rows; ++r) {
    u[r] = (load_one<T>(v + r) - token.decay * sum[r]) * token.beta;
    store_one<T>(o + r, (token.decay * sum[n + r] + token.qk * u[r]) * scale);
  }
  if (!out) return;
  unroll<n>([&](auto r) REMORA_ALWAYS_INLINE {
    for (int64_t d = 0; d < dims; d += w) {
      if (!kWhole && r >= rows) return;
      const Vec<T> updated = row(r, d) * token.decay + load<T>(token.k + d) * u[r];
      if constexpr (kWhole) {
        store<T>(out + r * dims + d, updated);
      } else {
        store_first<T>(out + r * dims + d, updated, min(w, dims - d));
      }
    }
  });
}

template <class T>
T softplus(T x) {
  return x > T(20) ? x : std::log1p(std::exp(x));
}

template <class T, class E>
inline void load_step_token(StepToken<T>& token, const GatedDeltaRuleStepParams& p, const E* q, const E* k, int64_t row,
                            int64_t value_head) {
  constexpr int w = kWidth<T>;
  const int64_t dims = p.shape.head_dim;
  Vec<T> qq{}, kk{}, qk{};
  for (int64_t d = 0; d < pad(dims); d += w) {
    Vec<T> q_part{}, k_part{};
    if (d < dims) {
      q_part = dims - d >= w ? load<T>(q + d) : load_first<T>(q + d, dims - d);
      k_part = dims - d >= w ? load<T>(k + d) : load_first<T>(k + d, dims - d);
    }
    store<T>(token.q + d, q_part);
    store<T>(token.k + d, k_part);
    qq += q_part * q_part;
    kk += k_part * k_part;
    qk += q_part * k_part;
  }
  token.qk = sum<T>(qk);
  if (p.use_qk_l2norm) {
    const T q_norm = T(1) / std::sqrt(sum<T>(qq) + T(kNormEpsilon));
    const T k_norm = T(1) / std::sqrt(sum<T>(kk) + T(kNormEpsilon));
    for (int64_t d = 0; d < pad(dims); d += w) {
      store<T>(token.q + d, load<T>(token.q + d) * q_norm);
      store<T>(token.k + d, load<T>(token.k + d) * k_norm);
    }
    token.qk *= q_norm * k_norm;
  }
  token.decay = T(1);
  if (p.g) {
    T gate = static_cast<const T*>(p.g)[row];
    if (p.a_log) {
      if (p.dt_bias) gate += static_cast<const T*>(p.dt_bias)[value_head];
      gate = -std::exp(static_cast<const T*>(p.a_log)[value_head]) * softplus(gate);
    }
    token.decay = std::exp(gate < kMinGate<T> ? kMinGate<T> : gate);
  }
  token.beta = static_cast<const T*>(p.beta)[row];
  if (p.use_beta_sigmoid) token.beta = T(1) / (T(1) + std::exp(-token.beta));
  if (p.use_beta_sigmoid && p.allow_neg_eigval) token.beta *= T(2);
}

/// A single token, on the state where it lies.
template <class T, class E>
void step_one(const GatedDeltaRuleStepParams& p, const StepToken<T>& token, const T* in, T* out, const E* v, E* o) {
  const int64_t dims = p.shape.head_dim, columns = p.shape.value_dim;
  const T scale = static_cast<T>(p.scale);
  if (p.state_v_first) {
    for (int64_t j = 0; j < columns; j += kStepRows<T>) {
      const int64_t rows = min(kStepRows<T>, columns - j);
      T* out_rows = out ? out + j * dims : nullptr;
      if (rows == kStepRows<T> && dims % kWidth<T> == 0) {
        step_rows<true>(token, in + j * dims, out_rows, dims, rows, v + j, o + j, scale);
      } else {
        step_rows<false>(token, in + j * dims, out_rows, dims, rows, v + j, o + j, scale);
      }
    }
    return;
  }
  int64_t j = step_blocks<kStepVectors>(token, in, out, dims, columns, 0, v, o, scale);
  j = step_blocks<kStepVectors / 2>(token, in, out, dims, columns, j, v, o, scale);
  j = step_blocks<1>(token, in, out, dims, columns, j, v, o, scale);
  if (j == columns) return;
  const int64_t lanes = columns - j;
  Vec<T> key_read{}, query_read{};
  for (int64_t d = 0; d < dims; ++d) {
    const Vec<T> s = load_first<T>(in + d * columns + j, lanes);
    key_read += s * token.k[d];
    query_read += s * token.q[d];
  }
  const Vec<T> u = (load_first<T>(v + j, lanes) - key_read * token.decay) * token.beta;
  store_first<T>(o + j, Vec<T>((query_read * token.decay + u * token.qk) * scale), lanes);
  if (!out) return;
  for (int64_t d = 0; d < dims; ++d) {
    const Vec<T> s = load_first<T>(in + d * columns + j, lanes);
    store_first<T>(out + d * columns + j, Vec<T>(s * token.decay + u * token.k[d]), lanes);
  }
}

/// `slot` is the row of the state tensors.
template <class T, class E>
void step(const GatedDeltaRuleStepParams& p, const RecurrenceSequence& sequence, int64_t value_head, int64_t slot,
          void* buffer) {
  constexpr int w = kWidth<T>;
  constexpr int panel_width = kRecurrentVectors * w;
  const RecurrenceShape& shape = p.shape;
  const int64_t dims = shape.head_dim, columns = shape.value_dim, value_heads = shape.num_value_heads;
  const int64_t head = value_head / (value_heads / shape.num_heads);
  const int64_t offset = (slot * value_heads + value_head) * dims * columns;
  const T* in = p.initial_state ? static_cast<const T*>(p.initial_state) + offset : nullptr;
  T* out = p.final_state ? static_cast<T*>(p.final_state) + offset : nullptr;
  const E* q = static_cast<const E*>(p.q) + head * p.q_stride.head;
  const E* k = static_cast<const E*>(p.k) + head * p.k_stride.head;
  const E* v = static_cast<const E*>(p.v) + value_head * p.v_stride.head;
  Arena arena(buffer);
  StepScratch<T> scratch(shape, arena);
  StepToken<T>& token = scratch.token;
  const auto load_token = [&](const TokenRow& row) {
    load_step_token<T>(token, p, q + row.offset(p.q_stride), k + row.offset(p.k_stride),
                       row.row * value_heads + value_head, value_head);
  };

  if (sequence.length == 1 && in) {
    load_token(sequence.first);
    step_one<T>(p, token, in, out, v + sequence.first.offset(p.v_stride),
                static_cast<E*>(p.o) + (sequence.first.row * value_heads + value_head) * columns);
    return;
  }
  if (sequence.length == 0 && in == out) return;
  for (int64_t j = 0; j < columns; j += panel_width) {
    const int64_t lanes = min(panel_width, columns - j);
    T* panel = scratch.panel;
    for (int64_t d = 0; d < dims; ++d) {
      for (int64_t i = 0; i < panel_width; ++i) {
        panel[d * panel_width + i] = !in || i >= lanes ? T(0)
                                     : p.state_v_first ? in[(j + i) * dims + d]
                                                       : in[d * columns + j + i];
      }
    }
    for (int64_t t = 0; t < sequence.length; ++t) {
      const TokenRow row = sequence.at(shape, t);
      load_token(row);
      const E* v_row = v + row.offset(p.v_stride) + j;
      E* o_row = static_cast<E*>(p.o) + (row.row * value_heads + value_head) * columns + j;
      E partial[panel_width] = {};
      for (int64_t i = 0; lanes < panel_width && i < lanes; ++i) partial[i] = v_row[i];
      const E* v_whole = lanes == panel_width ? v_row : partial;
      Vec<T> v_vectors[kRecurrentVectors], o_vectors[kRecurrentVectors];
      unroll<kRecurrentVectors>([&](auto i) REMORA_ALWAYS_INLINE { v_vectors[i] = load<T>(v_whole + i * w); });
      step_columns<kRecurrentVectors>(token, panel, panel_width, panel, panel_width, dims, v_vectors, o_vectors,
                                      static_cast<T>(p.scale));
      E* o_whole = lanes == panel_width ? o_row : partial;
      unroll<kRecurrentVectors>([&](auto i) REMORA_ALWAYS_INLINE { store<T>(o_whole + i * w, o_vectors[i]); });
      for (int64_t i = 0; lanes < panel_width && i < lanes; ++i) o_row[i] = partial[i];
    }
    for (int64_t d = 0; out && d < dims; ++d) {
      for (int64_t i = 0; i < lanes; ++i) {
        out[p.state_v_first ? (j + i) * dims + d : d * columns + j + i] = panel[d * panel_width + i];
      }
    }
  }
}

}  // namespace remora::REMORA_CPU_ISA
