// wmma.load, wmma.mma, wmma.store.
//
// PTX leaves the layout of wmma fragments unspecified. Ours is linear: slot
// (register * 32 + lane) * E + e holds element slot % (rows * cols) of the
// row-major matrix, so fragments with redundant registers repeat.
#include <algorithm>

#include "check/observer.h"
#include "ops/matrix.h"
#include "ops/space.h"
#include "ops/sync.h"
#include "sim/memory.h"

namespace ptxsim {
namespace {

struct Shape {
  unsigned rows, cols, element_bytes;
  bool row_major;  ///< in memory
};
void store_shape(Inst& in, const Shape& s) {
  in.imm[0] = s.rows | s.cols << 8 | s.element_bytes << 16 | uint32_t{s.row_major} << 24;
}
Shape load_shape(const Inst& in) {
  return {in.imm[0] & 0xff, in.imm[0] >> 8 & 0xff, in.imm[0] >> 16 & 0xff, (in.imm[0] >> 24 & 1) != 0};
}

/// Calls f(register byte pointer, memory byte pointer) for each distinct element.
template <class F>
void for_elements(Warp& w, const Inst& in, unsigned registers, bool repeat, AccessKind kind, F&& f) {
  const Shape s = load_shape(in);
  const auto lane = static_cast<uint32_t>(__builtin_ctz(w.exec));
  uint64_t addr[kWarpSize];
  effective_addresses(w, in, in.op[registers], addr);
  const uint32_t ld = w.src<uint32_t>(in.op[registers + 1])[lane];
  const unsigned reg_bytes = std::max(4u, s.element_bytes), per = reg_bytes / s.element_bytes;
  const unsigned total = s.rows * s.cols, slots = registers * kWarpSize * per;
  const unsigned runs = s.row_major ? s.rows : s.cols, run = s.row_major ? s.cols : s.rows;
  uint8_t* base[64];
  for (unsigned i = 0; i < runs; ++i) {
    const uint64_t at = addr[lane] + uint64_t{i} * ld * s.element_bytes;
    base[i] = resolve(w, in.mem.space, at, uint64_t{run} * s.element_bytes, lane, false);
    observe_range(w, in.mem.space == Space::generic ? window_of(at) : in.mem.space, kind, lane, at, base[i],
                  uint64_t{run} * s.element_bytes);
  }
  for (unsigned slot = 0; slot < (repeat ? slots : std::min(slots, total)); ++slot) {
    const unsigned e = slot % total, row = e / s.cols, col = e % s.cols;
    uint8_t* memory = s.row_major ? base[row] + col * s.element_bytes : base[col] + row * s.element_bytes;
    const unsigned word = slot / per, reg = word / kWarpSize, l = word % kWarpSize;
    f(w.dst<uint8_t>(in.op[reg]) + l * reg_bytes + slot % per * s.element_bytes, memory, s.element_bytes);
  }
}

void exec_load(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  for_elements(w, in, in.n_op - 2u, true, AccessKind::load,
               [](uint8_t* reg, uint8_t* memory, unsigned n) { std::memcpy(reg, memory, n); });
}
void exec_store(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  for_elements(w, in, in.n_op - 2u, false, AccessKind::store,
               [](uint8_t* reg, uint8_t* memory, unsigned n) { std::memcpy(memory, reg, n); });
}

/// Reads the matrix of a fragment into contiguous elements.
void gather(const Warp& w, const Operand* op, unsigned total, unsigned element_bytes, uint8_t* out) {
  const unsigned per_register = kWarpSize * std::max(4u, element_bytes);
  for (unsigned done = 0, i = 0; done < total * element_bytes; ++i) {
    const unsigned n = std::min(per_register, total * element_bytes - done);
    std::memcpy(out + done, w.src<uint8_t>(op[i]), n);
    done += n;
  }
}
void scatter(Warp& w, const Operand* op, unsigned total, unsigned element_bytes, const uint8_t* in) {
  const unsigned per_register = kWarpSize * std::max(4u, element_bytes);
  for (unsigned done = 0, i = 0; done < total * element_bytes; ++i) {
    const unsigned n = std::min(per_register, total * element_bytes - done);
    std::memcpy(w.dst<uint8_t>(op[i]), in + done, n);
    done += n;
  }
}

// imm[0] = m | n << 8 | k << 16, imm[1] = types, imm[2] = register counts d, a, b (c = rest)
void exec_mma(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  const unsigned m = in.imm[0] & 0xff, n = in.imm[0] >> 8 & 0xff, k = in.imm[0] >> 16;
  const auto ta = static_cast<MmaType>(in.imm[1] & 15), tb = static_cast<MmaType>(in.imm[1] >> 4 & 15);
  const bool c_half = in.imm[1] >> 8 & 1, d_half = in.imm[1] >> 9 & 1, saturate = in.imm[1] >> 10 & 1;
  const unsigned nd = in.imm[2] & 0xff, na = in.imm[2] >> 8 & 0xff, nb = in.imm[2] >> 16;
  const Operand *od = in.op, *oa = od + nd, *ob = oa + na, *oc = ob + nb;
  alignas(32) uint8_t ra[32 * 16 * 8], rb[16 * 32 * 8], rc[32 * 32 * 8];
  gather(w, oa, m * k, mma_element_bytes(ta), ra);
  gather(w, ob, k * n, mma_element_bytes(tb), rb);
  if (ta == MmaType::f64) {
    gather(w, oc, m * n, 8, rc);
    auto *a = reinterpret_cast<double*>(ra), *b = reinterpret_cast<double*>(rb), *c = reinterpret_cast<double*>(rc);
    for (unsigned i = 0; i < m; ++i)
      for (unsigned q = 0; q < k; ++q)
        for (unsigned j = 0; j < n; ++j) c[i * n + j] = std::fma(a[i * k + q], b[q * n + j], c[i * n + j]);
    return scatter(w, od, m * n, 8, rc);
  }
  if (ta == MmaType::s8 || ta == MmaType::u8) {
    gather(w, oc, m * n, 4, rc);
    auto* c = reinterpret_cast<int32_t*>(rc);
    int32_t a[32 * 16], b[16 * 32];
    convert_to_int(ta, ra, a, m * k);
    convert_to_int(tb, rb, b, k * n);
    for (unsigned i = 0; i < m; ++i)
      for (unsigned j = 0; j < n; ++j) {
        int64_t sum = c[i * n + j];
        for (unsigned q = 0; q < k; ++q) sum += int64_t{a[i * k + q]} * b[q * n + j];
        if (saturate) sum = std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX);
        c[i * n + j] = static_cast<int32_t>(sum);
      }
    return scatter(w, od, m * n, 4, rc);
  }
  alignas(32) float a[32 * 16], b[16 * 32], c[32 * 32];
  convert_to_float(ta, ra, a, m * k);
  convert_to_float(tb, rb, b, k * n);
  gather(w, oc, m * n, c_half ? 2 : 4, rc);
  if (c_half)
    convert_to_float(MmaType::f16, rc, c, m * n);
  else
    std::memcpy(c, rc, m * n * 4);
  multiply_tile(w.launch->options, ta, d_half, c, n, a, k, b, n, m, n, k);
  if (d_half) {
    auto* h = reinterpret_cast<half*>(rc);
    for (unsigned i = 0; i < m * n; ++i) h[i] = to_half(c[i]);
    return scatter(w, od, m * n, 2, rc);
  }
  scatter(w, od, m * n, 4, reinterpret_cast<uint8_t*>(c));
}

Type word_of(Type t) { return size_of(t) == 8 ? Type::f64 : Type::b32; }

size_t add_fragment(Decode& d, const ast::Operand& o, Type t, bool out) {
  auto one = [&](const ast::Operand& e) { d.add(out ? d.out_of(e, t) : d.in_of(e, t)); };
  if (o.kind != ast::Operand::vector) {
    one(o);
    return 1;
  }
  for (const auto& p : o.parts) one(p);
  return o.parts.size();
}

void decode_mma(Decode& d) {
  const bool saturate = d.flag("satfinite");
  d.pick({"row", "col"});
  d.pick({"row", "col"});
  unsigned m, n, k;
  if (!parse_shape(d.next(), m, n, k)) d.unsupported("shape");
  std::vector<Type> types;
  while (d.has_type()) types.push_back(d.type());
  MmaType a = MmaType::f16, b = MmaType::f16;
  Type td, tc;
  if (types.size() == 2) {
    td = types[0], tc = types[1];
  } else if (types.size() == 4) {
    td = types[0], tc = types[3];
    if (!parse_mma_type(types[1], a) || !parse_mma_type(types[2], b)) d.unsupported("element type");
  } else {
    d.unsupported();
  }
  const Type ab = a == MmaType::f64 ? Type::f64 : Type::b32;
  d.expect_count(4);
  const size_t nd = add_fragment(d, d.arg(0), word_of(td), true);
  const size_t na = add_fragment(d, d.arg(1), ab, false), nb = add_fragment(d, d.arg(2), ab, false);
  add_fragment(d, d.arg(3), word_of(tc), false);
  d.inst.imm[0] = m | n << 8 | k << 16;
  d.inst.imm[1] = static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 4 | uint32_t{tc == Type::f16} << 8 |
                  uint32_t{td == Type::f16} << 9 | uint32_t{saturate} << 10;
  d.inst.imm[2] = static_cast<uint32_t>(nd | na << 8 | nb << 16);
  d.exec(exec_mma, InstClass::mma);
  d.finish();
  note_mma_work(d, types.size() == 2 ? Type::f16 : types[1], uint64_t{2} * m * n * k);
}

void decode_wmma(Decode& d) {
  const auto what = d.pick({"load", "store", "mma"});
  const bool load = what == "load";
  std::string_view operand;
  if (what != "mma") operand = d.pick({"a", "b", "c", "d"});
  if (!d.flag("sync") || !d.flag("aligned")) d.unsupported();
  if (what == "mma") return decode_mma(d);
  const bool row = d.pick({"row", "col"}) == "row";
  unsigned m = 0, n = 0, k = 0;
  const auto shape = d.pick({"m16n16k16", "m8n32k16", "m32n8k16", "m16n16k8", "m8n8k4"});
  if (!parse_shape(shape, m, n, k)) d.unsupported("shape");
  const Space space = take_space(d);
  const Type t = d.type();
  Shape s{m, n, size_of(t), row};
  if (operand == "a") s.cols = k;
  if (operand == "b") s.rows = k;
  add_fragment(d, d.arg(load ? 0 : 1), word_of(t), load);
  d.address(load ? 1 : 0, space);
  if (d.count() == 3)
    d.in(2, Type::u32);
  else
    d.add(d.constant(Type::u32, row ? s.cols : s.rows));
  store_shape(d.inst, s);
  d.inst.mem.space = space;
  d.exec(load ? exec_load : exec_store, load ? InstClass::ld_generic : InstClass::st_generic);
  d.finish();
}

}  // namespace

void register_wmma(OpcodeTable& t) { t["wmma"] = decode_wmma; }

}  // namespace ptxsim
