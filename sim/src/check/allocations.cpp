#include "check/allocations.h"

#include <algorithm>
#include <cstring>
#include <mutex>

namespace ptxsim {

/// Calls f(range) for every range that shares a byte with [begin, end).
template <class F>
void Allocations::for_overlapping(uint64_t begin, uint64_t end, F&& f) const {
  for (auto it = ranges_.lower_bound(begin - std::min(begin, longest_)); it != ranges_.end() && it->first < end; ++it)
    if (it->second->end > begin) f(it->second);
}

void Allocations::add(const void* p, uint64_t bytes, std::string name, bool initialised) {
  auto a = std::make_shared<Allocation>();
  a->begin = reinterpret_cast<uint64_t>(p);
  a->end = a->begin + bytes;
  a->name = std::move(name);
  if (!initialised) a->written.reset(static_cast<uint8_t*>(std::calloc(std::max<uint64_t>(bytes, 1), 1)));
  const std::unique_lock lock(mutex_);
  for_overlapping(a->begin, a->end, [&](const auto& other) { other->alone = a->alone = false; });
  freed_.erase(a->begin);
  longest_ = std::max(ranges_.empty() ? 0 : longest_, bytes);
  ranges_.emplace(a->begin, std::move(a));
  version_.fetch_add(1, std::memory_order_release);
}

bool Allocations::remove(const void* p, bool remember) {
  const std::unique_lock lock(mutex_);
  const auto begin = reinterpret_cast<uint64_t>(p);
  auto it = ranges_.upper_bound(begin);
  if (it == ranges_.begin() || std::prev(it)->first != begin) return false;
  --it;
  if (remember) freed_[begin] = {it->second->end, it->second->name};
  ranges_.erase(it);
  version_.fetch_add(1, std::memory_order_release);
  return true;
}

std::shared_ptr<Allocation> Allocations::find(uint64_t a, uint64_t bytes) const {
  const std::shared_lock lock(mutex_);
  std::shared_ptr<Allocation> found;
  for_overlapping(a, a + bytes, [&](const auto& range) {
    if (range->holds(a, bytes)) found = range;
  });
  return found;
}

uint64_t Allocations::first_unwritten(uint64_t a, uint64_t bytes) const {
  const std::shared_lock lock(mutex_);
  for (uint64_t at = a; at < a + bytes; ++at) {
    bool written = false;
    for_overlapping(at, at + 1, [&](const auto& r) { written |= !r->written || r->written[at - r->begin]; });
    if (!written) return at;
  }
  return a + bytes;
}

void Allocations::mark_written(const void* p, uint64_t bytes) {
  const std::shared_lock lock(mutex_);
  const auto begin = reinterpret_cast<uint64_t>(p);
  for_overlapping(begin, begin + bytes, [&](const auto& r) {
    if (!r->written) return;
    const uint64_t first = std::max(begin, r->begin), last = std::min(begin + bytes, r->end);
    std::memset(r->written.get() + (first - r->begin), 1, last - first);
  });
}

std::string Allocations::describe(uint64_t address) const {
  const std::shared_lock lock(mutex_);
  if (auto f = freed_.upper_bound(address); f != freed_.begin() && address < std::prev(f)->second.end)
    return "inside freed " + std::prev(f)->second.name;
  const auto next = ranges_.upper_bound(address);
  if (next != ranges_.begin()) {
    const Allocation& a = *std::prev(next)->second;
    const std::string size = a.name + " of " + std::to_string(a.end - a.begin) + " bytes";
    if (address < a.end) return "across the end of " + size;
    return std::to_string(address - a.end) + " bytes behind the end of " + size;
  }
  if (next != ranges_.end()) return std::to_string(next->first - address) + " bytes before " + next->second->name;
  return "no allocation is registered";
}

Allocations& allocations() {
  static Allocations* registry = new Allocations;  // outlives static destructors of host code
  return *registry;
}

}  // namespace ptxsim
