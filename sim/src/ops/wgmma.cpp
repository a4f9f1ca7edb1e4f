// wgmma.mma_async: the four warps of a warpgroup multiply a 64 x K tile from
// shared memory or registers with a K x N tile from shared memory. Warp i of
// the group owns rows 16i .. 16i+15, so each warp computes its rows alone.
#include <algorithm>

#include "ops/matrix.h"
#include "ops/sync.h"
#include "ops/tensor_tile.h"
#include "sim/cta.h"
#include "sim/memory.h"

namespace ptxsim {
namespace {

constexpr unsigned kRows = 16;  // of one warp
constexpr unsigned kMaxN = 256;
constexpr unsigned kMaxK = 32;

/// A shared-memory matrix descriptor.
struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  Swizzle swizzle;

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    static constexpr Swizzle kModes[4] = {Swizzle::none, Swizzle::b128, Swizzle::b64, Swizzle::b32};
    swizzle = kModes[bits >> 62];
  }
  unsigned chunks() const {  // 16-byte chunks of a swizzle row
    return swizzle == Swizzle::b128 ? 8 : swizzle == Swizzle::b64 ? 4 : swizzle == Swizzle::b32 ? 2 : 1;
  }
  /// Address of the 16-byte chunk that holds element `chunk` along K of row `row`.
  uint32_t k_major(unsigned row, unsigned chunk) const {
    const uint32_t a = swizzle == Swizzle::none ? start + row / 8 * stride + row % 8 * 16 + chunk * leading
                                                : start + row / 8 * stride + row % 8 * 16 * chunks() + chunk * 16;
    return swizzle_address(a, swizzle);
  }
  /// Address of the chunk of 16 bytes along M or N at index `chunk`, for one k.
  uint32_t mn_major(unsigned chunk, unsigned k) const {
    const uint32_t a = swizzle == Swizzle::none ? start + chunk * stride + k % 8 * 16 + k / 8 * leading
                                                : start + chunk % chunks() * 16 + chunk / chunks() * leading +
                                                      k % 8 * 16 * chunks() + k / 8 * stride;
    return swizzle_address(a, swizzle);
  }
};

// imm[0] = n | k << 16; imm[1] = types a, b | flags
enum Flag : uint32_t {
  kHalfAcc = 1 << 8,
  kARegisters = 1 << 9,
  kTransA = 1 << 10,
  kTransB = 1 << 11,
  kNegA = 1 << 12,
  kNegB = 1 << 13,
  kSat = 1 << 14,
  kNegScale = 1 << 15
};

struct Spec {
  unsigned n, k, nd, na;
  MmaType a, b;
  uint32_t flags;
  explicit Spec(const Inst& in)
      : n(in.imm[0] & 0xffff),
        k(in.imm[0] >> 16),
        a(static_cast<MmaType>(in.imm[1] & 15)),
        b(static_cast<MmaType>(in.imm[1] >> 4 & 15)),
        flags(in.imm[1]) {
    nd = n / ((flags & kHalfAcc) ? 4 : 2);
    na = (flags & kARegisters) ? 4 : 1;
  }
};

const uint8_t* chunk_at(Warp& w, uint32_t address) {
  Cta& cta = *w.cta;
  if (address < kReservedShared || address + 16 > cta.shared_bytes)
    fault(w, 0, "wgmma descriptor addresses memory outside the CTA's shared memory");
  return cta.shared.data() + address;
}

template <class T>
using Convert = void (*)(MmaType, const void*, T*, unsigned);

/// out[row][k], rows x K.
template <class T>
void load_rows(Warp& w, const Descriptor& d, MmaType t, bool transposed, unsigned first, unsigned rows, unsigned k,
               T* out, unsigned ld, Convert<T> convert) {
  const unsigned bytes = mma_element_bytes(t), per = 16 / bytes;
  if (!transposed) {
    for (unsigned r = 0; r < rows; ++r)
      for (unsigned c = 0; c < k / per; ++c)
        convert(t, chunk_at(w, d.k_major(first + r, c)), out + r * ld + c * per, per);
    return;
  }
  T chunk[16];
  for (unsigned q = 0; q < k; ++q)
    for (unsigned c = 0; c < rows / per; ++c) {
      convert(t, chunk_at(w, d.mn_major(first / per + c, q)), chunk, per);
      for (unsigned e = 0; e < per; ++e) out[(c * per + e) * ld + q] = chunk[e];
    }
}

/// out[k][n], K x N.
template <class T>
void load_b(Warp& w, const Descriptor& d, const Spec& s, T* out, Convert<T> convert) {
  const unsigned per = 16 / mma_element_bytes(s.b);
  if (s.flags & kTransB) {  // N is contiguous
    for (unsigned q = 0; q < s.k; ++q)
      for (unsigned c = 0; c < s.n / per; ++c)
        convert(s.b, chunk_at(w, d.mn_major(c, q)), out + q * s.n + c * per, per);
    return;
  }
  T chunk[16];
  for (unsigned r = 0; r < s.n; ++r)
    for (unsigned c = 0; c < s.k / per; ++c) {
      convert(s.b, chunk_at(w, d.k_major(r, c)), chunk, per);
      for (unsigned e = 0; e < per; ++e) out[(c * per + e) * s.n + r] = chunk[e];
    }
}

/// A fragment in registers, as of mma.m16n8k*.
template <class T>
void load_a_registers(const uint8_t* frame, const Operand* op, const Spec& s, T* out, Convert<T> convert) {
  const unsigned width = 16 / mma_element_bytes(s.a);
  T block[8 * 16];
  for (unsigned i = 0; i < 4; ++i) {
    convert(s.a, frame + op[i].offset, block, 8 * width);
    for (unsigned r = 0; r < 8; ++r)
      for (unsigned c = 0; c < width; ++c) out[(8 * (i % 2) + r) * s.k + width * (i / 2) + c] = block[r * width + c];
  }
}

struct Issue {
  uint64_t a, b;  // descriptors
  bool scale_d;
};

template <class T>
void load_inputs(Warp& w, const Inst& in, const Spec& s, const Issue& issue, const uint8_t* frame, T* a, T* b,
                 Convert<T> convert) {
  const unsigned first = w.index % 4 * kRows;
  if (s.flags & kARegisters)
    load_a_registers(frame, in.op + s.nd, s, a, convert);
  else
    load_rows(w, Descriptor(issue.a), s.a, (s.flags & kTransA) != 0, first, kRows, s.k, a, s.k, convert);
  load_b(w, Descriptor(issue.b), s, b, convert);
}

void compute_float(Warp& w, const Inst& in, const Issue& issue, uint8_t* frame) {
  const Spec s(in);
  alignas(32) thread_local float a[kRows * kMaxK], b[kMaxK * kMaxN], c[kRows * kMaxN];
  load_inputs<float>(w, in, s, issue, frame, a, b, convert_to_float);
  if (((s.flags & kNegA) != 0) != ((s.flags & kNegB) != 0))
    for (unsigned i = 0; i < kRows * s.k; ++i) a[i] = -a[i];
  const bool half_acc = s.flags & kHalfAcc;
  if (!issue.scale_d) std::fill_n(c, kRows * s.n, 0.0f);
  for (unsigned j = 0; j < s.nd && issue.scale_d; ++j) {
    const uint8_t* r = frame + in.op[j].offset;
    if (half_acc) {
      float v[64];
      convert_to_float(MmaType::f16, r, v, 64);
      for (unsigned l = 0; l < kWarpSize; ++l)
        for (unsigned e = 0; e < 2; ++e) c[(l / 4 + 8 * (j % 2)) * s.n + 8 * (j / 2) + 2 * (l % 4) + e] = v[2 * l + e];
    } else {
      for (unsigned l = 0; l < kWarpSize; ++l)
        c[(l / 4 + 8 * (j % 4 / 2)) * s.n + 8 * (j / 4) + 2 * (l % 4) + j % 2] = reinterpret_cast<const float*>(r)[l];
    }
  }
  multiply_tile(w.launch->options, s.a, half_acc, c, s.n, a, s.k, b, s.n, kRows, s.n, s.k);
  for (unsigned j = 0; j < s.nd; ++j) {
    uint8_t* r = frame + in.op[j].offset;
    for (unsigned l = 0; l < kWarpSize; ++l) {
      if (half_acc) {
        for (unsigned e = 0; e < 2; ++e)
          reinterpret_cast<half*>(r)[2 * l + e] =
              to_half(c[(l / 4 + 8 * (j % 2)) * s.n + 8 * (j / 2) + 2 * (l % 4) + e]);
      } else {
        reinterpret_cast<float*>(r)[l] =
            canonical(c[(l / 4 + 8 * (j % 4 / 2)) * s.n + 8 * (j / 4) + 2 * (l % 4) + j % 2]);
      }
    }
  }
}

void compute_int(Warp& w, const Inst& in, const Issue& issue, uint8_t* frame) {
  const Spec s(in);
  thread_local int32_t a[kRows * kMaxK], b[kMaxK * kMaxN];
  load_inputs<int32_t>(w, in, s, issue, frame, a, b, convert_to_int);
  for (unsigned j = 0; j < s.nd; ++j) {
    auto* r = reinterpret_cast<int32_t*>(frame + in.op[j].offset);
    for (unsigned l = 0; l < kWarpSize; ++l) {
      const unsigned row = l / 4 + 8 * (j % 4 / 2), col = 8 * (j / 4) + 2 * (l % 4) + j % 2;
      int64_t v = issue.scale_d ? r[l] : 0;
      for (unsigned q = 0; q < s.k; ++q) v += int64_t{a[row * s.k + q]} * b[q * s.n + col];
      if (s.flags & kSat) v = std::clamp<int64_t>(v, INT32_MIN, INT32_MAX);
      r[l] = static_cast<int32_t>(v);
    }
  }
}

template <class F>
void for_warpgroup(Warp& w, F&& f) {
  const uint32_t first = w.index / 4 * 4;
  for (uint32_t i = first; i < first + 4; ++i) f(*w.cta->warps[i]);
}

/// Operations every warp of the warpgroup has issued; an exited warp holds nobody up.
uint64_t issued_by_all(Warp& w) {
  uint64_t n = ~0ull;
  for_warpgroup(w, [&](Warp& other) {
    if (!other.done()) n = std::min(n, other.async->wgmma.issued);
  });
  return n;
}

// Operands: d..., a (descriptor or four registers), b descriptor, scale-d predicate
void exec_wgmma(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  const Spec s(in);
  if (w.exec != kAllLanes || w.launch->warps_per_cta() % 4) fault(w, 0, "wgmma needs whole warpgroups");
  const Operand* rest = in.op + s.nd + s.na;
  Issue issue;
  issue.a = (s.flags & kARegisters) ? 0 : w.src<uint64_t>(in.op[s.nd])[0];
  issue.b = w.src<uint64_t>(rest[0])[0];
  issue.scale_d = ((w.predicate(rest[1]) & 1) != 0) != ((s.flags & kNegScale) != 0);
  if ((issue.b >> 49 & 7) || (!(s.flags & kARegisters) && (issue.a >> 49 & 7)))
    fault(w, 0, "wgmma descriptor with a base offset is not supported");
  const bool integer = s.a == MmaType::s8 || s.a == MmaType::u8;
  auto effect = [&w, &in, issue, integer, frame = w.frame] {
    uint8_t* f = w.frame_at(frame);
    integer ? compute_int(w, in, issue, f) : compute_float(w, in, issue, f);
  };
  WgmmaQueue& queue = w.async->wgmma;
  queue.pending.push_back(effect);
  ++queue.issued;
  if (w.launch->options.async == AsyncMode::late) return;
  const uint64_t ready = issued_by_all(w);
  for_warpgroup(w, [&](Warp& other) { other.async->wgmma.perform(ready); });
}

void exec_commit(Warp& w, const Inst&) {
  if (warp_converged(w)) w.async->wgmma.groups.push_back(w.async->wgmma.issued);
}

void exec_wait(Warp& w, const Inst& in) {
  if (!warp_converged(w)) return;
  WgmmaQueue& queue = w.async->wgmma;
  if (queue.groups.size() <= in.imm[0]) return;
  const uint64_t needed = queue.groups[queue.groups.size() - 1 - in.imm[0]];
  if (issued_by_all(w) < needed) {  // another warp has yet to issue its part: look again later
    --w.pc;
    w.stop = w.polled = true;
    return;
  }
  // The operation is one: when it is complete for this warp, it is for all four.
  for_warpgroup(w, [&](Warp& other) { other.async->wgmma.perform(needed); });
  while (queue.groups.size() > in.imm[0]) queue.groups.pop_front();
}
void exec_fence(Warp& w, const Inst&) { warp_converged(w); }

void decode_mma_async(Decode& d) {
  unsigned m, n, k;
  if (!parse_shape(d.next(), m, n, k)) d.unsupported("shape");
  uint32_t flags = d.flag("satfinite") ? uint32_t{kSat} : 0;
  const Type td = d.type(), ta = d.type(), tb = d.type();
  MmaType a, b;
  if (!parse_mma_type(ta, a) || !parse_mma_type(tb, b) || mma_element_bytes(a) != mma_element_bytes(b))
    d.unsupported("element types");
  if (m != 64 || n % 8 || n > kMaxN || k * mma_element_bytes(a) != 32) d.unsupported("shape");
  const bool integer = a == MmaType::s8 || a == MmaType::u8;
  if (integer ? td != Type::s32 : (td != Type::f32 && td != Type::f16)) d.unsupported("accumulator type");
  if (td == Type::f16) flags |= kHalfAcc;
  const ast::Operand &dst = d.arg(0), &left = d.arg(1);
  if (dst.kind != ast::Operand::vector || dst.parts.size() != n / (td == Type::f16 ? 4 : 2))
    d.unsupported("accumulator registers");
  for (const auto& p : dst.parts) d.add(d.out_of(p, Type::b32));
  if (left.kind == ast::Operand::vector) {
    if (left.parts.size() != 4) d.unsupported("A registers");
    flags |= kARegisters;
    for (const auto& p : left.parts) d.add(d.out_of(p, Type::b32));
  } else {
    d.in(1, Type::b64);
  }
  d.in(2, Type::b64);
  bool negated = false;
  d.predicate_in(3, negated);
  if (negated) flags |= kNegScale;
  size_t i = 4;
  if (!integer) {
    if (static_cast<int64_t>(d.immediate(i++)) < 0) flags |= kNegA;
    if (static_cast<int64_t>(d.immediate(i++)) < 0) flags |= kNegB;
    if (mma_element_bytes(a) == 2) {
      if (!(flags & kARegisters) && d.immediate(i++)) flags |= kTransA;
      if (d.immediate(i++)) flags |= kTransB;
    }
  }
  d.expect_count(i);
  d.inst.imm[0] = n | k << 16;
  d.inst.imm[1] = static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 4 | flags;
  d.exec(exec_wgmma, InstClass::mma);
  d.finish();
  note_mma_work(d, ta, uint64_t{2} * kRows * n * k);
}

void decode_wgmma(Decode& d) {
  const auto what = d.pick({"mma_async", "fence", "commit_group", "wait_group"});
  if (!d.flag("sync") || !d.flag("aligned")) d.unsupported();
  if (d.flag("sp")) d.unsupported("sparse wgmma");
  if (what == "mma_async") return decode_mma_async(d);
  if (what == "wait_group") d.inst.imm[0] = static_cast<uint32_t>(d.immediate(0));
  d.exec(what == "commit_group" ? exec_commit : what == "wait_group" ? exec_wait : exec_fence, InstClass::fence);
  d.finish();
}

}  // namespace

void register_wgmma(OpcodeTable& t) {
  t["wgmma"] = decode_wgmma;
  t["tcgen05"] = [](Decode& d) { d.unsupported("Blackwell tensor cores (tcgen05) are not simulated"); };
}

}  // namespace ptxsim
