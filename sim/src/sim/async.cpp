#include "sim/async.h"

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

std::vector<GroupQueue::Effect> GroupQueue::take_all() {
  std::vector<Effect> out;
  for (auto& group : groups_)
    for (auto& e : group) out.push_back(std::move(e));
  for (auto& e : open_) out.push_back(std::move(e));
  groups_.clear();
  open_.clear();
  return out;
}

void AsyncQueues::drain() {
  for (int l = 0; l < 32; ++l) {
    cp_async[l].drain();
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
