#include "check/shadow.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "sim/cta.h"

namespace ptxsim {
namespace {

constexpr uint32_t kLaneBits = 6;
constexpr uint32_t kLaneMask = (1u << kLaneBits) - 1;
constexpr uint32_t kSeveral = 32;  ///< instead of a lane: more than one
constexpr uint32_t kPending = UINT32_MAX;
constexpr uint8_t kMaxChain = 64;
constexpr size_t kMaxEvents = 1u << 21;  ///< then the unreferenced ones are dropped; below 2^25 for signed compares

inline __m128i load4(const uint32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void store4(uint32_t* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }

/// Whether each of four records is empty or of event `known`.
inline bool all_known(__m128i records, uint32_t known) {
  const __m128i event = _mm_srli_epi32(records, kLaneBits);
  const __m128i ok = _mm_or_si128(_mm_cmpeq_epi32(event, _mm_setzero_si128()),
                                  _mm_cmpeq_epi32(event, _mm_set1_epi32(static_cast<int>(known))));
  return _mm_movemask_epi8(ok) == 0xffff;
}

}  // namespace

SharedShadow::SharedShadow(Cta& cta)
    : cta_(cta),
      race_(cta.launch->options.racecheck != RaceCheck::off),
      init_(cta.launch->options.initcheck),
      strict_(cta.launch->options.racecheck == RaceCheck::strict),
      warps_(static_cast<uint32_t>(cta.warps.size())) {
  if (init_) written_.assign(cta.shared_bytes, 0);
  if (!race_) return;
  clock_.assign(warps_, Clock(warps_, 0));
  for (uint32_t w = 0; w < warps_; ++w) clock_[w][w] = 1;
  barrier_clock_.assign(16, Clock(warps_, 0));
  const size_t words = (cta.shared_bytes + 3) / 4;
  events_.resize(1);
  split_.assign(words, 0);
  write_.assign(words, 0);
  readers_.assign(words, 0);
  read_.assign(warps_, std::vector<Record>(words, 0));
  async_.resize(warps_);
  epoch_of_.assign(warps_, UINT32_MAX);
  epoch_start_.assign(warps_, 0);
  known_write_.assign(warps_, 0);
  known_read_.assign(warps_, std::vector<uint32_t>(warps_, 0));
}

// ---- clocks -------------------------------------------------------------------

void SharedShadow::join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void SharedShadow::barrier_arrived(Warp& w, uint32_t id) {
  if (!race_) return;
  join(barrier_clock_[id], clock_[w.index]);
  ++clock_[w.index][w.index];
  ++w.sync_epoch;
}

void SharedShadow::barrier_completed(uint32_t id) {
  if (!race_) return;
  for (const auto& w : cta_.warps)
    if (w->lanes_at_barrier(static_cast<uint8_t>(id))) join(clock_[w->index], barrier_clock_[id]);
  barrier_clock_[id].assign(warps_, 0);
}

void SharedShadow::release(Warp& w, const uint8_t* object) {
  if (!race_) return;
  auto [it, fresh] = object_clock_.try_emplace(object, Clock(warps_, 0));
  join(it->second, clock_[w.index]);
  ++clock_[w.index][w.index];
}

void SharedShadow::acquire(Warp& w, const uint8_t* object) {
  if (!race_) return;
  auto it = object_clock_.find(object);
  if (it != object_clock_.end()) join(clock_[w.index], it->second);
}

// ---- cp.async -------------------------------------------------------------------

void SharedShadow::commit_group(Warp& w) {
  if (!race_) return;
  for_lanes(w.exec, [&](uint32_t l) { ++async_[w.index].committed[l]; });
}

void SharedShadow::wait_group(Warp& w, uint32_t keep) {
  if (race_) complete(w, w.exec, keep);
}

void SharedShadow::wait_all(Warp& w) {
  if (!race_) return;
  commit_group(w);
  complete(w, w.exec, 0);
}

/// All but the newest `keep` groups of `lanes` are done: their writes count as made now.
void SharedShadow::complete(Warp& w, uint32_t lanes, uint32_t keep) {
  AsyncState& s = async_[w.index];
  std::erase_if(s.pending, [&](AsyncEvent& p) {
    for_lanes(p.lanes & lanes, [&](uint32_t l) {
      if (p.group[l] + keep < s.committed[l]) p.lanes &= ~(1u << l);
    });
    if (p.lanes) return false;
    events_[p.event].clock = clock_[w.index][w.index];
    events_[p.event].epoch = w.sync_epoch;
    return true;
  });
}

// ---- the order of two accesses ------------------------------------------------------

bool SharedShadow::event_ordered(const Warp& w, uint32_t lane, const Event& e, uint32_t before_lane) const {
  if (e.warp != w.index) return e.clock <= clock_[w.index][e.warp];
  return e.clock != kPending && (e.epoch != w.sync_epoch || before_lane == lane);
}

/// A read sees the bytes of a write: one of those that wrote them must be ordered before it.
bool SharedShadow::read_ordered(const Warp& w, uint32_t lane, Record write) const {
  if (write >> kLaneBits >= first_) return true;
  for (uint32_t e = write >> kLaneBits; e; e = events_[e].also)
    if (event_ordered(w, lane, events_[e], write & kLaneMask) || (atomic_ && events_[e].atomic)) return true;
  return false;
}

bool SharedShadow::write_ordered(const Warp& w, uint32_t lane, Record write) const {
  if (write >> kLaneBits >= first_) return true;
  for (uint32_t e = write >> kLaneBits; e; e = events_[e].also)
    if (!event_ordered(w, lane, events_[e], write & kLaneMask) && !(atomic_ && events_[e].atomic)) return false;
  return true;
}

bool SharedShadow::ordered_for_all_lanes(const Warp& w, const Event& e) const {
  if (atomic_ || e.clock == kPending) return false;
  return e.warp != w.index ? e.clock <= clock_[w.index][e.warp] : e.epoch != w.sync_epoch;
}

void SharedShadow::learn_write(const Warp& w, Record write) {
  const Event& e = events_[write >> kLaneBits];
  if (!e.also && ordered_for_all_lanes(w, e)) known_write_[w.index] = write >> kLaneBits;
}

void SharedShadow::learn_read(const Warp& w, uint32_t reader, Record read) {
  if (ordered_for_all_lanes(w, events_[read >> kLaneBits])) known_read_[w.index][reader] = read >> kLaneBits;
}

/// The present instruction writes what the event `before` wrote, unordered.
void SharedShadow::link(uint32_t before) {
  if (events_[before].chain == kMaxChain || events_[event_].also == before) return;
  if (events_[event_].also) {  // another cell of this instruction had another writer
    events_.push_back(Event{events_[event_]});
    event_ = static_cast<uint32_t>(events_.size()) - 1;
  }
  events_[event_].also = before;
  events_[event_].chain = static_cast<uint8_t>(events_[before].chain + 1);
}

void SharedShadow::report(const Warp& w, uint32_t lane, const char* hazard, Record before, uint64_t offset) const {
  const Event& e = events_[before >> kLaneBits];
  std::string who = "warp " + std::to_string(e.warp);
  if ((before & kLaneMask) != kSeveral) who += " lane " + std::to_string(before & kLaneMask);
  const char* why = e.clock == kPending ? ": the cp.async of " : ": no barrier orders this access behind that of ";
  fault(w, lane,
        "racecheck: " + std::string(hazard) + " hazard on shared memory offset " +
            std::to_string(offset - kReservedShared) + why + who +
            (e.clock == kPending ? " has not been waited for" : "") + "\n  at " + w.program->where(e.pc) +
            "\n  and this access");
}

// ---- cells --------------------------------------------------------------------------

uint32_t SharedShadow::split(uint32_t word) {
  if (split_[word]) return split_[word];
  split_[word] = static_cast<uint32_t>(write_.size());
  write_.insert(write_.end(), 4, Record{write_[word]});
  readers_.insert(readers_.end(), 4, uint32_t{readers_[word]});
  for (auto& r : read_) r.insert(r.end(), 4, Record{r[word]});
  return split_[word];
}

/// Drops the events no cell refers to, keeping the order of the others.
void SharedShadow::collect() {
  std::vector<uint32_t> number(events_.size(), 0);
  auto mark = [&](uint32_t e) {
    for (; e && !number[e]; e = events_[e].also) number[e] = 1;
  };
  for (Record r : write_) mark(r >> kLaneBits);
  for (const auto& records : read_)
    for (Record r : records) mark(r >> kLaneBits);
  for (const AsyncState& s : async_)
    for (const AsyncEvent& p : s.pending) mark(p.event);
  for (uint32_t e : epoch_start_) mark(e);
  uint32_t next = 1;
  for (uint32_t e = 1; e < events_.size(); ++e) {
    if (!number[e]) continue;
    number[e] = next;
    events_[next] = events_[e];
    events_[next++].also = number[events_[e].also];
  }
  events_.resize(next);
  auto renumber = [&](Record& r) { r = number[r >> kLaneBits] << kLaneBits | (r & kLaneMask); };
  for (Record& r : write_) renumber(r);
  for (auto& records : read_)
    for (Record& r : records) renumber(r);
  for (AsyncState& s : async_)
    for (AsyncEvent& p : s.pending) p.event = number[p.event];
  for (uint32_t& e : epoch_start_) e = number[e];
  std::fill(known_write_.begin(), known_write_.end(), 0u);
  for (auto& known : known_read_) std::fill(known.begin(), known.end(), 0u);
}

void SharedShadow::begin_event(Warp& w, Order order) {
  if (events_.size() >= kMaxEvents) collect();
  first_ = event_ = static_cast<uint32_t>(events_.size());
  atomic_ = order == Order::atomic || order == Order::strong;
  Event e;
  e.clock = order == Order::async ? kPending : clock_[w.index][w.index];
  e.epoch = w.sync_epoch;
  e.pc = w.pc - 1;
  e.warp = static_cast<uint16_t>(w.index);
  e.atomic = atomic_;
  events_.push_back(e);
  if (epoch_of_[w.index] != w.sync_epoch) {
    epoch_of_[w.index] = w.sync_epoch;
    epoch_start_[w.index] = event_;
  }
}

void SharedShadow::read_cell(Warp& w, uint32_t lane, uint32_t cell, uint64_t offset) {
  const Record write = write_[cell];
  if (write && write >> kLaneBits != known_write_[w.index]) {
    if (!read_ordered(w, lane, write)) report(w, lane, "read-after-write", write, offset);
    learn_write(w, write);
  }
  Record& mine = read_[w.index][cell];
  const bool again = mine >> kLaneBits >= epoch_start_[w.index] && (mine & kLaneMask) != lane;
  mine = event_ << kLaneBits | (again ? kSeveral : lane);
  readers_[cell] |= 1u << w.index;
}

void SharedShadow::write_cell(Warp& w, uint32_t lane, uint32_t cell, uint64_t offset, uint32_t size, bool update) {
  auto hazard = [&](const char* what, Record before) {
    if (strict_ || !settled_) report(w, lane, what, before, offset);
    uint32_t old = 0;
    std::memcpy(&old, cta_.shared.data() + offset, size);
    suspects_.push_back({static_cast<uint32_t>(offset), size, old, what, before, lane});
  };
  const Record write = write_[cell];
  bool together = false;
  if (write && write >> kLaneBits != known_write_[w.index]) {
    together = !write_ordered(w, lane, write);
    if (together)
      hazard("write-after-write", write);
    else
      learn_write(w, write);
  }
  for (uint32_t rest = readers_[cell]; rest; rest &= rest - 1) {
    const auto r = static_cast<uint32_t>(__builtin_ctz(rest));
    const Record read = read_[r][cell];
    const uint32_t event = read >> kLaneBits;
    if (event == known_read_[w.index][r] || event >= first_) continue;
    if (atomic_ && events_[event].atomic) continue;
    if (!event_ordered(w, lane, events_[event], read & kLaneMask))
      hazard("write-after-read", read);
    else
      learn_read(w, r, read);
  }
  if (together) link(write >> kLaneBits);
  readers_[cell] = 0;
  if (update) {  // an atomic reads and writes
    readers_[cell] = 1u << w.index;
    read_[w.index][cell] = event_ << kLaneBits | lane;
  }
  write_[cell] = event_ << kLaneBits | lane;
}

// Most accesses are of 16 bytes (ldmatrix, cp.async, vectors) whose four words have one history.

void SharedShadow::read_lane(Warp& w, uint32_t lane, uint64_t offset, uint64_t bytes) {
  const auto word = static_cast<uint32_t>(offset / 4);
  if (bytes == 16 && offset % 4 == 0 && _mm_testz_si128(load4(&split_[word]), load4(&split_[word]))) {
    const __m128i writes = load4(&write_[word]);
    bool known = all_known(writes, known_write_[w.index]);
    if (!known) {
      learn_write(w, write_[word]);
      known = all_known(writes, known_write_[w.index]);
    }
    if (known) {
      Record* mine = &read_[w.index][word];
      const __m128i before = load4(mine), wanted = _mm_set1_epi32(static_cast<int>(lane));
      const __m128i plain = _mm_set1_epi32(static_cast<int>(event_ << kLaneBits | lane));
      const __m128i several = _mm_set1_epi32(static_cast<int>(event_ << kLaneBits | kSeveral));
      const __m128i oldest = _mm_set1_epi32(static_cast<int>(epoch_start_[w.index]) - 1);
      const __m128i recent = _mm_cmpgt_epi32(_mm_srli_epi32(before, kLaneBits), oldest);
      const __m128i same = _mm_cmpeq_epi32(_mm_and_si128(before, _mm_set1_epi32(kLaneMask)), wanted);
      store4(mine, _mm_blendv_epi8(plain, several, _mm_andnot_si128(same, recent)));
      store4(&readers_[word], _mm_or_si128(load4(&readers_[word]), _mm_set1_epi32(static_cast<int>(1u << w.index))));
      return;
    }
  }
  for (uint64_t at = offset; at < offset + bytes;) {
    const auto i = static_cast<uint32_t>(at / 4);
    if (at % 4 == 0 && at + 4 <= offset + bytes && !split_[i]) {
      read_cell(w, lane, i, at);
      at += 4;
    } else {
      read_cell(w, lane, split(i) + at % 4, at);
      ++at;
    }
  }
}

/// Whether the four words at `word` may be written: their writes and reads are known to be ordered before.
bool SharedShadow::may_write_4(const Warp& w, uint32_t word) {
  const __m128i writes = load4(&write_[word]);
  if (!all_known(writes, known_write_[w.index])) {
    learn_write(w, write_[word]);
    if (!all_known(writes, known_write_[w.index])) return false;
  }
  uint32_t readers = readers_[word] | readers_[word + 1] | readers_[word + 2] | readers_[word + 3];
  for (; readers; readers &= readers - 1) {
    const auto r = static_cast<uint32_t>(__builtin_ctz(readers));
    const __m128i reads = load4(&read_[r][word]);
    if (all_known(reads, known_read_[w.index][r])) continue;
    learn_read(w, r, read_[r][word]);
    if (!all_known(reads, known_read_[w.index][r])) return false;
  }
  return true;
}

void SharedShadow::write_lane(Warp& w, uint32_t lane, uint64_t offset, uint64_t bytes, bool update) {
  const auto word = static_cast<uint32_t>(offset / 4);
  if (bytes == 16 && offset % 4 == 0 && !update && _mm_testz_si128(load4(&split_[word]), load4(&split_[word])) &&
      may_write_4(w, word)) {
    store4(&readers_[word], _mm_setzero_si128());
    store4(&write_[word], _mm_set1_epi32(static_cast<int>(event_ << kLaneBits | lane)));
    return;
  }
  for (uint64_t at = offset; at < offset + bytes;) {
    const auto i = static_cast<uint32_t>(at / 4);
    if (at % 4 == 0 && at + 4 <= offset + bytes && !split_[i]) {
      write_cell(w, lane, i, at, 4, update);
      at += 4;
    } else {
      write_cell(w, lane, split(i) + at % 4, at, 1, update);
      ++at;
    }
  }
}

void SharedShadow::check_suspects(Warp& w) {
  for (const Suspect& s : std::exchange(suspects_, {})) {
    uint32_t now = 0;
    std::memcpy(&now, cta_.shared.data() + s.offset, s.size);
    if (now != s.old) report(w, s.lane, s.hazard, s.before, s.offset);
  }
}

// ---- accesses -----------------------------------------------------------------------

void SharedShadow::check_initialised(Warp& w, AccessKind kind, uint32_t lane, uint64_t offset, uint64_t bytes) {
  uint8_t* written = written_.data() + offset;
  if (kind != AccessKind::store) {
    uint64_t i = 0;
    for (uint64_t eight; i + 8 <= bytes; i += 8)
      if (std::memcpy(&eight, written + i, 8); eight != 0x0101010101010101u) break;
    for (; i < bytes; ++i)
      if (!written[i])
        fault(
            w, lane,
            "initcheck: read of uninitialised shared memory at offset " + std::to_string(offset + i - kReservedShared));
  }
  if (kind != AccessKind::load) std::memset(written, 1, bytes);
}

void SharedShadow::access(Warp& w, AccessKind kind, Order order, uint32_t mask, uint8_t* const* host, uint64_t bytes,
                          bool settled) {
  const uint8_t* begin = cta_.shared.data();
  const uint64_t size = cta_.shared_bytes;
  settled_ = settled;
  if (race_) begin_event(w, order);
  for_lanes(mask, [&](uint32_t l) {
    const auto offset = static_cast<uint64_t>(host[l] - begin);
    if (offset >= size || offset + bytes > size) return;  // another CTA's
    if (order == Order::strong) acquire(w, host[l]);
    if (init_) check_initialised(w, kind, l, offset, bytes);
    if (race_) {
      if (kind == AccessKind::load)
        read_lane(w, l, offset, bytes);
      else
        write_lane(w, l, offset, bytes, kind == AccessKind::atomic);
    }
    if (order == Order::strong) release(w, host[l]);
  });
  if (race_ && order == Order::async) {
    AsyncState& s = async_[w.index];
    AsyncEvent& pending = s.pending.emplace_back();
    pending.event = event_;
    pending.lanes = mask;
    std::memcpy(pending.group, s.committed, sizeof pending.group);
  }
}

}  // namespace ptxsim
