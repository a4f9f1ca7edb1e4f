// cp.async.bulk and cp.async.bulk.tensor (TMA), and their reductions.
#include <array>
#include <memory>
#include <mutex>

#include "check/observer.h"
#include "check/shadow.h"
#include "ops/local_address.h"
#include "ops/space.h"
#include "ops/table.h"
#include "ops/tensor_tile.h"
#include "sim/cta.h"
#include "sim/memory.h"

namespace ptxsim {

void complete_tx(Cluster& cluster, uint8_t* mbarrier, uint32_t bytes);  // mbarrier.cpp

namespace {

/// Operand positions of a bulk instruction; absent ones have no bytes.
enum Slot : unsigned { kShared, kGlobal, kSize, kBarrier, kMask, kCoordinate0, kSlots = kCoordinate0 + 5 };
/// variant: what moves where.
enum class Move : uint8_t { load, store, shared_to_shared };

/// base + displacement: the shared one is in disp, the others in imm.
uint64_t address(const Warp& w, const Inst& in, Slot s, uint32_t l) {
  const Operand& o = in.op[s];
  const uint64_t base = o.bytes == 8 ? w.src<uint64_t>(o)[l] : w.src<uint32_t>(o)[l];
  const int64_t disp = s == kShared ? in.disp : static_cast<int32_t>(s == kGlobal ? in.imm[0] : in.imm[1]);
  return base + static_cast<uint64_t>(disp);
}

/// Performs a copy that signals an mbarrier: now, or when the phase is waited for.
void signal_copy(Warp& w, uint8_t* mbarrier, uint32_t bytes, std::function<void()> effect) {
  Cluster& c = *w.cta->cluster;
  if (w.launch->options.async == AsyncMode::late) {
    c.events.add(mbarrier, {std::move(effect), bytes, 0});
    ++c.mbarrier_updates;
  } else {
    effect();
    complete_tx(c, mbarrier, bytes);
  }
}

/// Performs a copy of a bulk group: reading its source and writing its
/// destination are waited for separately (wait_group.read, wait_group).
void group_copy(Warp& w, uint32_t l, const uint8_t* source, uint32_t bytes, std::function<void(const uint8_t*)> write) {
  if (w.launch->options.async == AsyncMode::early) return write(source);
  auto snapshot = std::make_shared<std::vector<uint8_t>>();
  auto read = [snapshot, source, bytes] {
    if (snapshot->empty()) snapshot->assign(source, source + bytes);
  };
  w.async->bulk_read[l].add(read);
  w.async->bulk_write[l].add([snapshot, read, write] {
    read();
    write(snapshot->data());
  });
}

/// Tells the observers which global bytes a copy touches.
void observe_global(Warp& w, AccessKind kind, uint32_t l, const TensorMap* map, const int32_t* c, uint64_t global,
                    uint32_t bytes) {
  if (!w.launch->observe) return;
  if (!map) return observe_range(w, Space::global, kind, l, global, nullptr, bytes);
  for_tile_rows(*map, c, [&](uint64_t at, uint64_t n) { observe_range(w, Space::global, kind, l, at, nullptr, n); });
}

void load_bulk(Warp& w, const Inst& in, uint32_t l, const TensorMap* map, const int32_t* coordinates) {
  Cluster& cluster = *w.cta->cluster;
  const uint64_t shared = address(w, in, kShared, l), bar = address(w, in, kBarrier, l);
  const uint32_t bytes = map ? tile_bytes(*map) : w.src<uint32_t>(in.op[kSize])[l];
  const uint64_t global = map ? 0 : address(w, in, kGlobal, l);
  if (!map && (bytes % 16 || global % 16)) fault(w, l, "bulk copy: size and addresses must be multiples of 16");
  if (shared % (map ? 128 : 16))
    fault(w, l,
          map ? "tensor copy: shared address is not 128-byte aligned"
              : "bulk copy: shared address is not 16-byte aligned");
  uint8_t* first = resolve(w, Space::shared, shared, bytes, l, true);
  uint8_t* first_bar = resolve(w, Space::shared, bar, 8, l, true);
  const uint32_t offset_mask = (1u << kSharedRankShift) - 1;
  uint32_t targets = in.op[kMask].present() ? w.src<uint16_t>(in.op[kMask])[l] : 1u << (shared >> kSharedRankShift);
  w.cta->worker->stats.async_copy_bytes += bytes;
  observe_global(w, AccessKind::load, l, map, coordinates, global, bytes);
  const bool multicast = in.op[kMask].present();
  for_lanes(targets, [&](uint32_t rank) {
    if (rank >= cluster.ctas.size()) fault(w, l, "multicast to a CTA that is not in the cluster");
    Cta& cta = *cluster.ctas[rank];
    const uint32_t offset = static_cast<uint32_t>(shared) & offset_mask;
    uint8_t* to = multicast ? cta.shared.data() + offset : first;
    uint8_t* mbarrier = multicast ? cta.shared.data() + (static_cast<uint32_t>(bar) & offset_mask) : first_bar;
    observe_range(w, Space::shared, AccessKind::store, l, shared, to, bytes);
    if (w.cta->shadow && cta.rank == w.cta->rank) w.cta->shadow->release(w, mbarrier);
    if (map) {
      std::array<int32_t, 5> c;
      std::copy_n(coordinates, 5, c.begin());
      // A copy of the map: the launch's parameters outlive it, a global map may change.
      signal_copy(w, mbarrier, bytes,
                  [m = *map, c, base = to - offset, offset] { load_tile(m, c.data(), base, offset); });
    } else {
      signal_copy(w, mbarrier, bytes,
                  [to, from = reinterpret_cast<const uint8_t*>(global), bytes] { std::memcpy(to, from, bytes); });
    }
  });
}

void store_bulk(Warp& w, const Inst& in, uint32_t l, const TensorMap* map, const int32_t* coordinates) {
  const uint64_t shared = address(w, in, kShared, l);
  const uint32_t bytes = map ? tile_bytes(*map) : w.src<uint32_t>(in.op[kSize])[l];
  const uint64_t global = map ? 0 : address(w, in, kGlobal, l);
  if (!map && (bytes % 16 || global % 16)) fault(w, l, "bulk copy: size and addresses must be multiples of 16");
  if (shared % (map ? 128 : 16)) fault(w, l, "bulk copy: misaligned shared address");
  uint8_t* from = resolve(w, Space::shared, shared, bytes, l, false);
  const auto op = static_cast<BulkReduction>(in.mem.vec);
  const auto type = static_cast<Type>(in.mem.elem_bytes);
  w.cta->worker->stats.async_copy_bytes += bytes;
  observe_range(w, Space::shared, AccessKind::load, l, shared, from, bytes);
  observe_global(w, AccessKind::store, l, map, coordinates, global, bytes);
  const auto offset = static_cast<uint32_t>(from - w.cta->shared.data());
  if (map) {
    std::array<int32_t, 5> c;
    std::copy_n(coordinates, 5, c.begin());
    // store_tile swizzles absolute addresses, so hand it the tile at its own offset.
    group_copy(w, l, from, bytes,
               [m = *map, c, offset, op](const uint8_t* data) { store_tile(m, c.data(), data - offset, offset, op); });
  } else {
    group_copy(w, l, from, bytes, [global, bytes, op, type](const uint8_t* data) {
      auto* to = reinterpret_cast<uint8_t*>(global);
      if (op == BulkReduction::none) {
        std::memcpy(to, data, bytes);
        return;
      }
      static std::mutex mutex;
      const std::lock_guard lock(mutex);
      for (uint32_t i = 0; i < bytes; i += size_of(type)) reduce_element(to + i, data + i, type, op);
    });
  }
}

void copy_shared(Warp& w, const Inst& in, uint32_t l) {
  const uint64_t to = address(w, in, kShared, l), from = address(w, in, kGlobal, l), bar = address(w, in, kBarrier, l);
  const uint32_t bytes = w.src<uint32_t>(in.op[kSize])[l];
  uint8_t* dst = resolve(w, Space::shared, to, bytes, l, true);
  const uint8_t* src = resolve(w, Space::shared, from, bytes, l, true);
  signal_copy(w, resolve(w, Space::shared, bar, 8, l, true), bytes,
              [dst, src, bytes] { std::memcpy(dst, src, bytes); });
}

void exec_bulk(Warp& w, const Inst& in) {
  const auto move = static_cast<Move>(in.variant & 3);
  const bool tensor = in.variant & 4;
  for_lanes(w.exec, [&](uint32_t l) {
    const TensorMap* map = nullptr;
    int32_t c[5] = {};
    if (tensor) {
      const uint64_t at = address(w, in, kGlobal, l);
      map = TensorMap::from(resolve(w, Space::generic, at, 128, l, true));
      if (!map) fault(w, l, "tensor copy: the address does not hold a tensor map made by cuTensorMapEncodeTiled");
      if (map->rank != in.imm[2]) fault(w, l, "tensor copy: the tensor map has a different rank");
      for (unsigned d = 0; d < map->rank; ++d) c[d] = w.src<int32_t>(in.op[kCoordinate0 + d])[l];
    }
    switch (move) {
      case Move::load:
        return load_bulk(w, in, l, map, c);
      case Move::store:
        return store_bulk(w, in, l, map, c);
      case Move::shared_to_shared:
        return copy_shared(w, in, l);
    }
  });
}

void exec_commit(Warp& w, const Inst&) {
  for_lanes(w.exec, [&](uint32_t l) {
    w.async->bulk_read[l].commit();
    w.async->bulk_write[l].commit();
  });
}
void exec_wait(Warp& w, const Inst& in) {
  for_lanes(w.exec, [&](uint32_t l) {
    w.async->bulk_read[l].wait(in.imm[0]);
    if (!in.imm[1]) w.async->bulk_write[l].wait(in.imm[0]);
  });
}
void exec_nothing(Warp&, const Inst&) {}

BulkReduction take_reduction(Decode& d) {
  const auto op = d.pick({"add", "min", "max", "inc", "dec", "and", "or", "xor"});
  constexpr std::string_view kNames[] = {"", "add", "min", "max", "inc", "dec", "and", "or", "xor"};
  for (uint8_t i = 1; i < std::size(kNames); ++i)
    if (kNames[i] == op) return static_cast<BulkReduction>(i);
  d.unsupported("reduction");
}

/// An address operand whose displacement the caller stores; returns {base, disp}.
std::pair<Operand, int64_t> take_address(Decode& d, const ast::Operand& o, Space space) {
  d.address_of(o, space);
  const int64_t disp = d.inst.disp;
  return {d.take_last(), disp};
}

}  // namespace

void decode_bulk_copy(Decode& d) {
  d.flag("bulk");
  if (d.flag("commit_group")) {
    d.exec(exec_commit, InstClass::async_copy);
    return d.finish();
  }
  if (d.flag("wait_group")) {
    d.inst.imm[1] = d.flag("read");
    d.inst.imm[0] = static_cast<uint32_t>(d.immediate(0));
    d.exec(exec_wait, InstClass::async_copy);
    return d.finish();
  }
  if (d.flag("prefetch")) {
    while (d.more()) d.next();
    d.exec(exec_nothing, InstClass::async_copy);
    return d.finish();
  }
  const bool tensor = d.flag("tensor"), reduce = d.flag("reduce");
  unsigned rank = 0;
  if (tensor) {
    const auto dims = d.pick({"1d", "2d", "3d", "4d", "5d"});
    if (dims.empty()) d.unsupported();
    rank = static_cast<unsigned>(dims[0] - '0');
  }
  if (!d.pick({"im2col", "im2col_no_offs", "im2col::w", "im2col::w::128", "tile::gather4", "tile::scatter4"}).empty())
    d.unsupported("this tensor mode");
  d.flag("tile");
  // Destination and source spaces, in order.
  std::vector<std::string_view> spaces;
  while (spaces.size() < 2) {
    const std::string_view s = d.next();
    if (s != "shared::cluster" && s != "shared::cta" && s != "global" && s != "async")
      d.unsupported("space " + std::string(s));
    if (s != "async") spaces.push_back(s);
  }
  const Move move = spaces[0] == "global" ? Move::store : spaces[1] == "global" ? Move::load : Move::shared_to_shared;
  const bool multicast = d.flag("multicast::cluster");
  const bool policy = d.flag("L2::cache_hint");
  d.inst.mem.vec = 0;
  if (reduce) {
    d.inst.mem.vec = static_cast<uint8_t>(take_reduction(d));
    d.flag("noftz");
    if (!tensor) d.inst.mem.elem_bytes = static_cast<uint8_t>(d.type());
  }
  if (move == Move::store) {
    if (!d.flag("bulk_group")) d.unsupported();
  } else if (!d.flag("mbarrier::complete_tx::bytes"))
    d.unsupported();
  d.flag("cta_group::1");

  std::vector<Operand> slots(kSlots);
  size_t i = 0;
  int64_t shared_disp = 0;
  auto shared = [&](size_t at) {
    auto [o, disp] = take_address(d, d.arg(at), Space::shared);
    slots[kShared] = o;
    shared_disp = disp;
  };
  auto global = [&](size_t at, Space space) {
    auto [o, disp] = take_address(d, d.arg(at), space);
    slots[kGlobal] = o;
    if (disp != static_cast<int32_t>(disp)) {  // e.g. the address of a module variable
      slots[kGlobal] = d.scratch(8);
      emit_address(d.builder(), d.source(), slots[kGlobal], o, disp);
      disp = 0;
    }
    d.inst.imm[0] = static_cast<uint32_t>(disp);
    if (tensor) {
      if (d.arg(at).parts.size() != 2) d.unsupported("coordinates");
      const auto& c = d.arg(at).parts[1];
      const auto& list = c.parts;
      if (list.size() != rank) d.unsupported("number of coordinates");
      for (unsigned k = 0; k < rank; ++k) slots[kCoordinate0 + k] = d.in_of(list[k], Type::s32);
    }
  };
  if (move == Move::store) {
    global(i++, Space::global);
    shared(i++);
  } else {
    shared(i++);
    global(i++, move == Move::load ? Space::global : Space::shared);
  }
  if (!tensor) slots[kSize] = d.in_of(d.arg(i++), Type::u32);
  if (move != Move::store) {
    auto [o, disp] = take_address(d, d.arg(i++), Space::shared);
    slots[kBarrier] = o;
    d.inst.imm[1] = static_cast<uint32_t>(disp);
  }
  if (multicast) slots[kMask] = d.in_of(d.arg(i++), Type::b16);
  if (policy) ++i;
  d.expect_count(i);
  for (const Operand& o : slots) d.add(o);
  d.inst.disp = shared_disp;
  d.inst.imm[2] = rank;
  d.inst.variant = static_cast<uint8_t>(static_cast<unsigned>(move) | (tensor ? 4u : 0u));
  d.exec(exec_bulk, InstClass::async_copy);
  d.finish();
}

void register_bulk_copy(OpcodeTable&) {}

}  // namespace ptxsim
