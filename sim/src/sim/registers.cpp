#include "sim/registers.h"

#include <algorithm>
#include <map>
#include <queue>

namespace ptxsim {
namespace {

constexpr uint32_t kNone = UINT32_MAX;

/// Sets of slots, one per basic block.
class BlockSets {
 public:
  BlockSets(size_t blocks, size_t slots) : words_((slots + 63) / 64), bits_(blocks * words_, 0) {}
  uint64_t* operator[](size_t block) { return bits_.data() + block * words_; }
  size_t words() const { return words_; }

 private:
  size_t words_;
  std::vector<uint64_t> bits_;
};

bool has(const uint64_t* set, uint32_t i) { return set[i / 64] >> (i % 64) & 1; }
void insert(uint64_t* set, uint32_t i) { set[i / 64] |= uint64_t{1} << (i % 64); }

template <class F>
void for_members(const uint64_t* set, size_t words, F&& f) {
  for (size_t w = 0; w < words; ++w)
    for (uint64_t rest = set[w]; rest; rest &= rest - 1)
      f(static_cast<uint32_t>(64 * w) + static_cast<uint32_t>(__builtin_ctzll(rest)));
}

struct Interval {
  uint32_t first = kNone, last = 0;
  void include(uint32_t pc) { first = std::min(first, pc), last = std::max(last, pc); }
};

class Packer {
 public:
  Packer(const FunctionCode& f, const std::vector<RegisterSlot>& slots) : f_(f), slots_(slots), life_(slots.size()) {}

  uint32_t run(uint32_t begin) {
    find_blocks();
    find_lives();
    const uint32_t end = place(begin);
    rewrite();
    return end;
  }

 private:
  uint32_t slot_at(uint32_t offset) const {
    auto it = std::lower_bound(slots_.begin(), slots_.end(), offset,
                               [](const RegisterSlot& s, uint32_t o) { return s.offset < o; });
    return it != slots_.end() && it->offset == offset ? static_cast<uint32_t>(it - slots_.begin()) : kNone;
  }

  template <class F>
  void for_operands(const Inst& in, F&& f) const {
    for (uint32_t i = 0; i < in.n_op; ++i) {
      Operand& o = f_.operands[in.op_index + i];
      if (o.present() && o.bank == Bank::frame) f(o);
    }
  }

  void find_blocks() {
    std::vector<bool> leader(f_.code.size() + 1, false);
    leader[0] = true;
    for (auto [from, to] : f_.branches) leader[from + 1 - f_.first_pc] = leader[to - f_.first_pc] = true;
    for (uint32_t i = 0; i < f_.code.size(); ++i)
      if (leader[i]) starts_.push_back(i);
    block_count_ = starts_.size();
    starts_.push_back(static_cast<uint32_t>(f_.code.size()));
    successors_.resize(block_count_);
    for (uint32_t b = 0; b + 1 < block_count_; ++b) successors_[b].push_back(b + 1);
    for (auto [from, to] : f_.branches) successors_[block_of(from)].push_back(block_of(to));
  }

  uint32_t block_of(uint32_t pc) const {
    return static_cast<uint32_t>(std::upper_bound(starts_.begin(), starts_.end() - 1, pc - f_.first_pc) -
                                 starts_.begin() - 1);
  }

  /// Lanes are independent: a register of one lane lives along that lane's path, so the flow graph of a single thread
  /// says what may share. Only an unguarded write ends an earlier life.
  void find_lives() {
    BlockSets used(block_count_, slots_.size()), written(block_count_, slots_.size());
    for (uint32_t b = 0; b < block_count_; ++b)
      for (uint32_t i = starts_[b]; i < starts_[b + 1]; ++i) {
        const Inst& in = f_.code[i];
        for_operands(in, [&](const Operand& o) {
          const uint32_t s = slot_at(o.offset);
          life_[s].include(i);
          if (!o.written && !has(written[b], s)) insert(used[b], s);
        });
        for_operands(in, [&](const Operand& o) {
          if (o.written && !in.guarded) insert(written[b], slot_at(o.offset));
        });
      }
    BlockSets& live_in = used;
    const size_t words = live_in.words();
    std::vector<uint64_t> out(words);
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t b = block_count_; b-- > 0;) {
        gather_live_out(live_in, b, out);
        for (size_t w = 0; w < words; ++w) {
          const uint64_t bits = live_in[b][w] | (out[w] & ~written[b][w]);
          changed |= bits != live_in[b][w];
          live_in[b][w] = bits;
        }
      }
    }
    for (size_t b = 0; b < block_count_; ++b) {
      for_members(live_in[b], words, [&](uint32_t s) { life_[s].include(starts_[b]); });
      gather_live_out(live_in, b, out);
      for_members(out.data(), words, [&](uint32_t s) { life_[s].include(starts_[b + 1] - 1); });
    }
  }

  void gather_live_out(BlockSets& live_in, size_t block, std::vector<uint64_t>& out) const {
    std::fill(out.begin(), out.end(), uint64_t{0});
    for (uint32_t next : successors_[block])
      for (size_t w = 0; w < out.size(); ++w) out[w] |= live_in[next][w];
  }

  /// Linear scan. An instruction's results never share with its operands: handlers may write the one before they have
  /// read the other.
  uint32_t place(uint32_t top) {
    offset_.assign(slots_.size(), kNone);
    auto fresh = [&](uint32_t bytes) {
      const uint32_t align = std::min(bytes, 64u);
      const uint32_t at = (top + align - 1) / align * align;
      top = at + bytes;
      return at;
    };
    std::vector<uint32_t> order;
    for (uint32_t s = 0; s < slots_.size(); ++s) {
      if (!slots_[s].shareable)
        offset_[s] = fresh(slots_[s].bytes);
      else if (life_[s].first != kNone)
        order.push_back(s);
    }
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return life_[a].first < life_[b].first; });
    using Ending = std::pair<uint32_t, uint32_t>;  // last pc, slot
    std::priority_queue<Ending, std::vector<Ending>, std::greater<>> alive;
    std::map<uint32_t, std::vector<uint32_t>> free;  // by size
    for (uint32_t s : order) {
      for (; !alive.empty() && alive.top().first < life_[s].first; alive.pop())
        free[slots_[alive.top().second].bytes].push_back(offset_[alive.top().second]);
      auto& of_size = free[slots_[s].bytes];
      if (of_size.empty()) {
        offset_[s] = fresh(slots_[s].bytes);
      } else {
        offset_[s] = of_size.back();
        of_size.pop_back();
      }
      alive.emplace(life_[s].last, s);
    }
    return top;
  }

  void rewrite() {
    for (Inst& in : f_.code) {
      for_operands(in, [&](Operand& o) { o.offset = offset_[slot_at(o.offset)]; });
      if (in.guarded) in.guard_offset = offset_[slot_at(in.guard_offset)];
    }
  }

  const FunctionCode& f_;
  const std::vector<RegisterSlot>& slots_;
  std::vector<Interval> life_;    ///< per slot, in instructions of the function
  std::vector<uint32_t> offset_;  ///< per slot
  std::vector<uint32_t> starts_;  ///< of the blocks, and the end
  std::vector<std::vector<uint32_t>> successors_;
  size_t block_count_ = 0;
};

}  // namespace

uint32_t pack_registers(const FunctionCode& f, const std::vector<RegisterSlot>& slots, uint32_t begin) {
  return Packer(f, slots).run(begin);
}

}  // namespace ptxsim
