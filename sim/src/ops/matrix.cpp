// mma.sync and the movement of 8x8 tiles: ldmatrix, stmatrix, movmatrix.
#include "ops/matrix.h"
#include "check/shadow.h"
#include "ops/fragments.h"
#include "ops/space.h"
#include "ops/sync.h"
#include "ops/table.h"
#include "sim/cta.h"
#include "sim/memory.h"

namespace ptxsim {

bool parse_mma_type(Type t, MmaType& out) {
  switch (t) {
    case Type::f16:
      out = MmaType::f16;
      return true;
    case Type::bf16:
      out = MmaType::bf16;
      return true;
    case Type::tf32:
      out = MmaType::tf32;
      return true;
    case Type::f64:
      out = MmaType::f64;
      return true;
    case Type::s8:
      out = MmaType::s8;
      return true;
    case Type::u8:
      out = MmaType::u8;
      return true;
    case Type::e4m3:
      out = MmaType::e4m3;
      return true;
    case Type::e5m2:
      out = MmaType::e5m2;
      return true;
    default:
      return false;
  }
}

bool parse_shape(std::string_view s, unsigned& m, unsigned& n, unsigned& k) {
  unsigned* part = nullptr;
  m = n = k = 0;
  for (char c : s) {
    if (c == 'm')
      part = &m;
    else if (c == 'n')
      part = &n;
    else if (c == 'k')
      part = &k;
    else if (part && c >= '0' && c <= '9')
      *part = *part * 10 + static_cast<unsigned>(c - '0');
    else
      return false;
  }
  return m && n && k;
}

namespace {

// ---- mma ---------------------------------------------------------------------------
// imm[0] = m | n << 8 | k << 16; imm[1] = types a, b | (f16 accumulator in, out) ; operands d.., a.., b.., c..
struct MmaSpec {
  unsigned m, n, k, na, nb, nc, nd;
  MmaType a, b;
  bool c_half, d_half, saturate;
};
MmaSpec spec_of(const Inst& in) {
  MmaSpec s;
  s.m = in.imm[0] & 0xff, s.n = in.imm[0] >> 8 & 0xff, s.k = in.imm[0] >> 16;
  s.a = static_cast<MmaType>(in.imm[1] & 15), s.b = static_cast<MmaType>(in.imm[1] >> 4 & 15);
  s.c_half = in.imm[1] >> 8 & 1, s.d_half = in.imm[1] >> 9 & 1, s.saturate = in.imm[1] >> 10 & 1;
  const unsigned per_a = std::max(4u, mma_element_bytes(s.a)) / mma_element_bytes(s.a);
  s.na = s.m * s.k / (kWarpSize * per_a), s.nb = s.n * s.k / (kWarpSize * per_a);
  s.nc = s.m * s.n / kWarpSize / (s.c_half ? 2 : 1), s.nd = s.m * s.n / kWarpSize / (s.d_half ? 2 : 1);
  return s;
}

/// Element (row, column) of accumulator register i, lane l, for 32- and 64-bit accumulators.
inline unsigned acc_row(unsigned i, unsigned l) { return l / 4 + 8 * (i / 2); }
inline unsigned acc_col(unsigned i, unsigned l) { return 2 * (l % 4) + i % 2; }

template <class T, class Convert>
void load_a(const Warp& w, const Operand* op, const MmaSpec& s, T* a, Convert convert) {
  const unsigned width = s.k / (s.na / (s.m / 8));  // columns of one register block
  T block[8 * 16];
  for (unsigned i = 0; i < s.na; ++i) {
    convert(s.a, w.src<uint8_t>(op[i]), block, 8 * width);
    const unsigned row = 8 * (i % (s.m / 8)), col = width * (i / (s.m / 8));
    for (unsigned r = 0; r < 8; ++r) std::memcpy(a + (row + r) * s.k + col, block + r * width, width * sizeof(T));
  }
}
/// b becomes k x 8.
template <class T, class Convert>
void load_b(const Warp& w, const Operand* op, const MmaSpec& s, T* b, Convert convert) {
  const unsigned width = s.k / s.nb;
  T block[8 * 16];
  for (unsigned i = 0; i < s.nb; ++i) {
    convert(s.b, w.src<uint8_t>(op[i]), block, 8 * width);
    for (unsigned c = 0; c < width; ++c)
      for (unsigned r = 0; r < 8; ++r) b[(i * width + c) * 8 + r] = block[r * width + c];
  }
}

void exec_mma_float(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  const MmaSpec s = spec_of(in);
  alignas(32) float a[16 * 32], b[32 * 8], c[16 * 8];
  const Operand *od = in.op, *oa = od + s.nd, *ob = oa + s.na, *oc = ob + s.nb;
  load_a(w, oa, s, a, convert_to_float);
  load_b(w, ob, s, b, convert_to_float);
  if (s.c_half) {
    for (unsigned i = 0; i < s.nc; ++i) convert_to_float(MmaType::f16, w.src<uint8_t>(oc[i]), c + 64 * i, 64);
  } else {
    for (unsigned i = 0; i < s.nc; ++i) {
      const float* r = w.src<float>(oc[i]);
      for (unsigned l = 0; l < kWarpSize; ++l) c[acc_row(i, l) * 8 + acc_col(i, l)] = r[l];
    }
  }
  multiply_tile(w.launch->options, s.a, s.d_half, c, 8, a, s.k, b, 8, s.m, 8, s.k);
  if (s.d_half) {
    for (unsigned i = 0; i < s.nd; ++i) {
      half h[64];
      for (unsigned j = 0; j < 64; ++j) h[j] = to_half(c[64 * i + j]);
      std::memcpy(w.dst<uint8_t>(od[i]), h, sizeof h);
    }
  } else {
    for (unsigned i = 0; i < s.nd; ++i) {
      float* r = w.dst<float>(od[i]);
      for (unsigned l = 0; l < kWarpSize; ++l) r[l] = canonical(c[acc_row(i, l) * 8 + acc_col(i, l)]);
    }
  }
}

// ---- the common shapes: 16x8, f32 sums, 16-bit or tf32 inputs, k of one or two register blocks

inline __m256 load_row(MmaType t, const uint8_t* p) {  // 8 elements
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (t == MmaType::f16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m128 load_tf32(const uint8_t* p) {  // 4 elements
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_and_si128(bits, _mm_set1_epi32(static_cast<int>(0xffffe000u))));
}

/// Stores the transposed 8x8 matrix; row i of the result at out + 8 * i.
inline void store_transposed(const __m256 (&r)[8], float* out) {
  __m256 a[8], b[8];
  for (unsigned i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (unsigned i = 0; i < 8; i += 4)
    for (unsigned j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (unsigned i = 0; i < 4; ++i) {
    _mm256_store_ps(out + 8 * i, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    _mm256_store_ps(out + 8 * (i + 4), _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  }
}

inline __m256 canonical8(__m256 x) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

template <MmaType T, unsigned K>
void exec_mma_16x8(Warp& w, const Inst& in) {
  if (w.launch->options.mma != MmaMode::fma) return exec_mma_float(w, in);
  if (!warp_converged(w)) return;
  constexpr unsigned kBlocks = K * mma_element_bytes(T) / 16, kWidth = K / kBlocks;
  const Operand *od = in.op, *oa = od + 4, *ob = oa + 2 * kBlocks, *oc = ob + kBlocks;
  alignas(32) float a[16 * K], b[K * 8];
  for (unsigned i = 0; i < 2 * kBlocks; ++i) {
    const uint8_t* src = w.src<uint8_t>(oa[i]);
    float* to = a + 8 * (i % 2) * K + kWidth * (i / 2);
    for (unsigned r = 0; r < 8; ++r) {
      if constexpr (T == MmaType::tf32)
        _mm_storeu_ps(to + r * K, load_tf32(src + 16 * r));
      else
        _mm256_storeu_ps(to + r * K, load_row(T, src + 16 * r));
    }
  }
  for (unsigned i = 0; i < kBlocks; ++i) {
    const uint8_t* src = w.src<uint8_t>(ob[i]);
    __m256 rows[8];
    alignas(32) float transposed[64];
    for (unsigned r = 0; r < 8; ++r) {
      if constexpr (T == MmaType::tf32)
        rows[r] = _mm256_castps128_ps256(load_tf32(src + 16 * r));
      else
        rows[r] = load_row(T, src + 16 * r);
    }
    store_transposed(rows, transposed);
    std::memcpy(b + i * kWidth * 8, transposed, kWidth * 8 * sizeof(float));
  }
  for (unsigned half = 0; half < 2; ++half) {
    const float *even = w.src<float>(oc[2 * half]), *odd = w.src<float>(oc[2 * half + 1]);
    __m256 sum[8];
    for (unsigned r = 0; r < 8; ++r) {
      const __m128 e = _mm_loadu_ps(even + 4 * r), o = _mm_loadu_ps(odd + 4 * r);
      sum[r] = _mm256_set_m128(_mm_unpackhi_ps(e, o), _mm_unpacklo_ps(e, o));
    }
    const float* row = a + 8 * half * K;
    for (unsigned q = 0; q < K; ++q) {
      const __m256 column = _mm256_load_ps(b + 8 * q);
      for (unsigned r = 0; r < 8; ++r) sum[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(row + r * K + q), column, sum[r]);
    }
    float *d0 = w.dst<float>(od[2 * half]), *d1 = w.dst<float>(od[2 * half + 1]);
    for (unsigned r = 0; r < 8; ++r) {
      const __m256 x = canonical8(sum[r]);
      const __m128 low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
      _mm_storeu_ps(d0 + 4 * r, _mm_shuffle_ps(low, high, 0x88));
      _mm_storeu_ps(d1 + 4 * r, _mm_shuffle_ps(low, high, 0xdd));
    }
  }
}

/// The handler of a common shape, or exec_mma_float.
Handler float_handler(const MmaSpec& s) {
  if (s.m == 16 && s.n == 8 && s.a == s.b && !s.c_half) {
    if (s.a == MmaType::f16 && s.k == 16) return exec_mma_16x8<MmaType::f16, 16>;
    if (s.a == MmaType::f16 && s.k == 8) return exec_mma_16x8<MmaType::f16, 8>;
    if (s.a == MmaType::bf16 && s.k == 16) return exec_mma_16x8<MmaType::bf16, 16>;
    if (s.a == MmaType::bf16 && s.k == 8) return exec_mma_16x8<MmaType::bf16, 8>;
    if (s.a == MmaType::tf32 && s.k == 8) return exec_mma_16x8<MmaType::tf32, 8>;
    if (s.a == MmaType::tf32 && s.k == 4) return exec_mma_16x8<MmaType::tf32, 4>;
  }
  return exec_mma_float;
}

template <class T, class Sum>
void multiply(const Warp& w, const Inst& in, const MmaSpec& s, Sum* c,
              void (*convert)(MmaType, const void*, T*, unsigned)) {
  T a[16 * 32], b[32 * 8];
  const Operand *oa = in.op + s.nd, *ob = oa + s.na, *oc = ob + s.nb;
  load_a(w, oa, s, a, convert);
  load_b(w, ob, s, b, convert);
  for (unsigned i = 0; i < s.nc; ++i) {
    const auto* r = w.src<T>(oc[i]);
    for (unsigned l = 0; l < kWarpSize; ++l) c[acc_row(i, l) * 8 + acc_col(i, l)] = r[l];
  }
  for (unsigned m = 0; m < s.m; ++m)
    for (unsigned k = 0; k < s.k; ++k)
      for (unsigned n = 0; n < 8; ++n) {
        if constexpr (std::is_same_v<T, double>)
          c[m * 8 + n] = std::fma(a[m * s.k + k], b[k * 8 + n], c[m * 8 + n]);
        else
          c[m * 8 + n] += Sum{a[m * s.k + k]} * b[k * 8 + n];
      }
}

void exec_mma_int(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  const MmaSpec s = spec_of(in);
  int64_t c[16 * 8];
  multiply<int32_t>(w, in, s, c, convert_to_int);
  for (unsigned i = 0; i < s.nd; ++i) {
    auto* r = w.dst<int32_t>(in.op[i]);
    for (unsigned l = 0; l < kWarpSize; ++l) {
      int64_t v = c[acc_row(i, l) * 8 + acc_col(i, l)];
      if (s.saturate) v = std::clamp<int64_t>(v, INT32_MIN, INT32_MAX);
      r[l] = static_cast<int32_t>(v);
    }
  }
}

void copy_doubles(MmaType, const void* src, double* dst, unsigned n) { std::memcpy(dst, src, n * sizeof(double)); }
void exec_mma_f64(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  const MmaSpec s = spec_of(in);
  double c[16 * 8];
  multiply<double>(w, in, s, c, copy_doubles);
  for (unsigned i = 0; i < s.nd; ++i) {
    auto* r = w.dst<double>(in.op[i]);
    for (unsigned l = 0; l < kWarpSize; ++l) r[l] = c[acc_row(i, l) * 8 + acc_col(i, l)];
  }
}

void add_fragment(Decode& d, const ast::Operand& o, size_t count, Type t, bool out) {
  const bool vector = o.kind == ast::Operand::vector;
  if ((vector ? o.parts.size() : 1) != count) d.unsupported("fragment of unexpected length");
  for (size_t i = 0; i < count; ++i) {
    const ast::Operand& e = vector ? o.parts[i] : o;
    d.add(out ? d.out_of(e, t) : d.in_of(e, t));
  }
}

void decode_mma(Decode& d) {
  if (!d.flag("sync") || !d.flag("aligned")) d.unsupported();
  if (d.more() && d.modifiers()[0].substr(0, 2) == "sp") d.unsupported("sparse mma");
  unsigned m, n, k;
  if (!parse_shape(d.next(), m, n, k)) d.unsupported("shape");
  if (!d.flag("row") || !d.flag("col")) d.unsupported("only row.col");
  const bool saturate = d.flag("satfinite");
  if (d.flag("kind::f8f6f4")) d.unsupported("mma.kind::f8f6f4");
  const Type td = d.type(), ta = d.type(), tb = d.type(), tc = d.type();
  MmaType a, b;
  if (!parse_mma_type(ta, a) || !parse_mma_type(tb, b)) d.unsupported("element type");
  if (mma_element_bytes(a) != mma_element_bytes(b)) d.unsupported("mixed element sizes");
  const bool integer = a == MmaType::s8 || a == MmaType::u8;
  // The shapes of PTX for dense matrices whose fragments follow the common rule.
  const unsigned k_bytes = k * mma_element_bytes(a);
  const bool shape_ok =
      n == 8 &&
      ((m == 16 && (k_bytes == 16 || k_bytes == 32 || (a == MmaType::f64 && (k == 4 || k == 8 || k == 16)))) ||
       (m == 8 && ((a == MmaType::f64 && k == 4) || (integer && k == 16))));
  if (!shape_ok) d.unsupported("shape");
  const bool c_half = tc == Type::f16, d_half = td == Type::f16;
  const Type accumulator = integer ? Type::s32 : a == MmaType::f64 ? Type::f64 : Type::f32;
  if ((tc != accumulator && !c_half) || (td != accumulator && !d_half) || c_half != d_half)
    d.unsupported("accumulator type");
  d.inst.imm[0] = m | n << 8 | k << 16;
  d.inst.imm[1] = static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 4 | uint32_t{c_half} << 8 |
                  uint32_t{d_half} << 9 | uint32_t{saturate} << 10;
  const MmaSpec s = spec_of(d.inst);
  d.expect_count(4);
  const Type ab = a == MmaType::f64 ? Type::f64 : Type::b32, cd = a == MmaType::f64 ? Type::f64 : Type::b32;
  add_fragment(d, d.arg(0), s.nd, cd, true);
  add_fragment(d, d.arg(1), s.na, ab, false);
  add_fragment(d, d.arg(2), s.nb, ab, false);
  add_fragment(d, d.arg(3), s.nc, cd, false);
  d.exec(integer ? exec_mma_int : a == MmaType::f64 ? exec_mma_f64 : float_handler(s), InstClass::mma);
  d.finish();
  note_mma_work(d, ta, uint64_t{2} * m * n * k);
}

// ---- ldmatrix, stmatrix, movmatrix ------------------------------------------------
// imm[0] = matrices, imm[1] = transposed
void matrix_rows(Warp& w, const Inst& in, const Operand& base, AccessKind kind, uint8_t** row) {
  LaneAddresses a;
  const uint32_t lanes = in.imm[0] * 8;
  const uint32_t saved = w.exec;
  w.exec = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
  // Each matrix is one phase of eight 16-byte rows.
  lane_addresses(w, in, base, kind, a);
  w.exec = saved;
  for (uint32_t l = 0; l < lanes; ++l) row[l] = a.host[l];
}

/// The transposed 8x8 matrix of 16-bit elements with these rows.
void transpose_rows(uint8_t* const* row, uint32_t* out) {
  __m128i r[8], a[8], b[8];
  for (unsigned i = 0; i < 8; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[i]));
  for (unsigned i = 0; i < 4; ++i) {
    a[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
  }
  for (unsigned i = 0; i < 8; i += 4)
    for (unsigned j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm_unpacklo_epi32(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm_unpackhi_epi32(a[i + j], a[i + j + 2]);
    }
  for (unsigned i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * i), _mm_unpacklo_epi64(b[i], b[i + 4]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * i + 4), _mm_unpackhi_epi64(b[i], b[i + 4]));
  }
}

/// A register is, over the lanes, a matrix row by row.
void exec_ldmatrix(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  uint8_t* row[kWarpSize];
  const unsigned n = in.imm[0];
  matrix_rows(w, in, in.op[n], AccessKind::load, row);
  for (unsigned i = 0; i < n; ++i) {
    uint32_t r[kWarpSize];
    if (in.imm[1])
      transpose_rows(row + 8 * i, r);
    else
      for (unsigned j = 0; j < 8; ++j) std::memcpy(r + 4 * j, row[8 * i + j], 16);
    blend(w.dst<uint32_t>(in.op[i]), r, w.exec);
  }
}

void exec_stmatrix(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  uint8_t* row[kWarpSize];
  const unsigned n = in.imm[0];
  matrix_rows(w, in, in.op[n], AccessKind::store, row);
  for (unsigned i = 0; i < n; ++i) {
    const auto* r = w.src<uint32_t>(in.op[i]);
    for (uint32_t l = 0; l < kWarpSize; ++l) {
      if (!in.imm[1]) {
        std::memcpy(row[8 * i + l / 4] + 4 * (l % 4), &r[l], 4);
      } else {
        for (unsigned j = 0; j < 2; ++j) {
          const auto e = static_cast<uint16_t>(r[l] >> (16 * j));
          std::memcpy(row[8 * i + 2 * (l % 4) + j] + 2 * (l / 4), &e, 2);
        }
      }
    }
  }
  if (SharedShadow* shadow = w.cta->shadow.get()) shadow->settle(w);
}

void decode_matrix_move(Decode& d) {
  const bool load = d.base() == "ldmatrix";
  if (!d.flag("sync") || !d.flag("aligned")) d.unsupported();
  if (!d.flag("m8n8")) d.unsupported("only .m8n8");
  const auto num = d.pick({"x1", "x2", "x4"});
  const unsigned n = num == "x4" ? 4 : num == "x2" ? 2 : 1;
  d.inst.imm[0] = n;
  d.inst.imm[1] = d.flag("trans");
  if (!d.pick({"shared", "shared::cta"}).size())
    d.inst.mem.space = Space::generic;
  else
    d.inst.mem.space = Space::shared;
  if (d.type() != Type::b16) d.unsupported("only .b16");
  d.expect_count(2);
  add_fragment(d, d.arg(load ? 0 : 1), n, Type::b32, load);
  d.address(load ? 1 : 0, d.inst.mem.space);
  d.inst.mem.elem_bytes = 16;
  d.exec(load ? exec_ldmatrix : exec_stmatrix, load ? InstClass::ld_shared : InstClass::st_shared);
  d.finish();
}

void exec_movmatrix(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  uint16_t m[64], t[64];
  std::memcpy(m, w.src<uint32_t>(in.op[1]), sizeof m);
  for (unsigned r = 0; r < 8; ++r)
    for (unsigned c = 0; c < 8; ++c) t[c * 8 + r] = m[r * 8 + c];
  std::memcpy(w.dst<uint32_t>(in.op[0]), t, sizeof t);
}
void decode_movmatrix(Decode& d) {
  if (!d.flag("sync") || !d.flag("aligned") || !d.flag("m8n8") || !d.flag("trans") || d.type() != Type::b16)
    d.unsupported();
  d.out(0, Type::b32);
  d.in(1, Type::b32);
  d.exec(exec_movmatrix, InstClass::warp_sync);
  d.finish();
}

}  // namespace

void note_mma_work(Decode& d, Type t, uint64_t flops) {
  d.builder().program().mma_work[d.builder().next_pc() - 1] = {t, flops};
}

void register_matrix(OpcodeTable& t) {
  t["mma"] = decode_mma;
  t["ldmatrix"] = t["stmatrix"] = decode_matrix_move;
  t["movmatrix"] = decode_movmatrix;
  register_wmma(t);
}

}  // namespace ptxsim
