#include "sim/async.h"

#include <algorithm>
#include <cstring>

namespace ptxsim {

void GroupQueue::wait(size_t keep) {
  while (groups_.size() > keep) {
    auto group = std::move(groups_.front());
    groups_.pop_front();
    for (auto& effect : group) effect();
  }
}

void GroupQueue::drain() {
  wait(0);
  auto rest = std::move(open_);
  open_.clear();
  for (auto& effect : rest) effect();
}

void CopyQueue::Copy::perform() const {
  if (read) std::memcpy(to, from, read);
  if (read < written) std::memset(to + read, 0, written - read);
}

void CopyQueue::add(uint32_t lanes, const Copy (&copies)[32]) {
  Issue& issue = issued_.emplace_back();
  issue.lanes = lanes;
  std::copy_n(committed_, 32, issue.group);
  std::copy_n(copies, 32, issue.copy);
}

void CopyQueue::commit(uint32_t lanes) {
  for (uint32_t l = 0; l < 32; ++l) committed_[l] += lanes >> l & 1;
}

void CopyQueue::wait(uint32_t lanes, uint32_t keep) {
  std::erase_if(issued_, [&](Issue& issue) {
    for (uint32_t rest = issue.lanes & lanes; rest; rest &= rest - 1) {
      const auto l = static_cast<uint32_t>(__builtin_ctz(rest));
      if (issue.group[l] + keep >= committed_[l]) continue;
      issue.copy[l].perform();
      issue.lanes &= ~(1u << l);
    }
    return issue.lanes == 0;
  });
}

void CopyQueue::drain(uint32_t lanes) {
  commit(lanes);
  wait(lanes, 0);
}

std::vector<CopyQueue::Copy> CopyQueue::take_all(uint32_t lane) {
  std::vector<Copy> out;
  std::erase_if(issued_, [&](Issue& issue) {
    if (issue.lanes >> lane & 1) out.push_back(issue.copy[lane]);
    issue.lanes &= ~(1u << lane);
    return issue.lanes == 0;
  });
  return out;
}

void AsyncQueues::drain() {
  cp_async.drain(UINT32_MAX);
  for (int l = 0; l < 32; ++l) {
    bulk_read[l].drain();
    bulk_write[l].drain();
  }
  wgmma.perform(wgmma.issued);
}

// Layout: [0,20) expected, [20,40) pending, [40,63) tx (two's complement), [63] phase.
Mbarrier Mbarrier::load(const uint8_t* p) {
  uint64_t bits;
  std::memcpy(&bits, p, 8);
  Mbarrier m;
  m.expected = bits & kMbarrierMaxCount;
  m.pending = bits >> 20 & kMbarrierMaxCount;
  m.tx = static_cast<int32_t>(static_cast<int64_t>(bits << 1) >> 41);
  m.phase = bits >> 63;
  return m;
}

void Mbarrier::store(uint8_t* p) const {
  const uint64_t bits = uint64_t{expected} | uint64_t{pending} << 20 | (static_cast<uint64_t>(tx) & 0x7fffff) << 40 |
                        uint64_t{phase} << 63;
  std::memcpy(p, &bits, 8);
}

bool Mbarrier::try_complete() {
  if (pending != 0 || tx != 0) return false;
  phase = !phase;
  pending = expected;
  return true;
}

void MbarrierEvents::deliver_if_complete(uint8_t* mbarrier) {
  auto it = queue_.find(mbarrier);
  if (it == queue_.end() || it->second.empty()) return;
  auto& queue = it->second;
  Mbarrier m = Mbarrier::load(mbarrier);
  for (size_t n = 0; n < queue.size(); ++n) {
    m.tx -= static_cast<int32_t>(queue[n].tx_bytes);
    m.pending -= queue[n].arrivals;
    if (!m.try_complete()) continue;
    for (size_t i = 0; i <= n; ++i)
      if (queue[i].effect) queue[i].effect();
    queue.erase(queue.begin(), queue.begin() + static_cast<std::ptrdiff_t>(n) + 1);
    m.store(mbarrier);
    return;
  }
}

void MbarrierEvents::drain() {
  for (auto& [address, queue] : queue_)
    for (auto& e : queue)
      if (e.effect) e.effect();
  queue_.clear();
}

}  // namespace ptxsim
