#include "check/allocations.h"

#include <algorithm>
#include <mutex>

namespace ptxsim {

void Allocations::add(const void* p, uint64_t bytes, std::string name, bool initialised) {
  const std::unique_lock lock(mutex_);
  auto a = std::make_shared<Allocation>();
  a->begin = reinterpret_cast<uint64_t>(p);
  a->end = a->begin + bytes;
  a->name = std::move(name);
  if (!initialised) a->written.assign(bytes, 0);
  freed_.erase(a->begin);
  ranges_[a->begin] = std::move(a);
}

void Allocations::remove(const void* p, bool remember) {
  const std::unique_lock lock(mutex_);
  auto it = ranges_.find(reinterpret_cast<uint64_t>(p));
  if (it == ranges_.end()) return;
  if (remember) {
    auto freed = std::make_shared<Allocation>(*it->second);
    freed->freed = true;
    freed->written.clear();
    freed_[it->first] = std::move(freed);
  }
  ranges_.erase(it);
}

std::shared_ptr<Allocation> Allocations::find(uint64_t a) const {
  const std::shared_lock lock(mutex_);
  auto it = ranges_.upper_bound(a);
  if (it == ranges_.begin()) return nullptr;
  --it;
  return a < it->second->end ? it->second : nullptr;
}

void Allocations::mark_written(const void* p, uint64_t bytes) {
  auto begin = reinterpret_cast<uint64_t>(p);
  const uint64_t end = begin + bytes;
  while (begin < end) {
    auto a = find(begin);
    if (!a) return;
    const uint64_t stop = std::min(end, a->end);
    if (!a->written.empty())
      std::fill(a->written.begin() + static_cast<std::ptrdiff_t>(begin - a->begin),
                a->written.begin() + static_cast<std::ptrdiff_t>(stop - a->begin), uint8_t{1});
    begin = stop;
  }
}

std::string Allocations::describe(uint64_t address) const {
  const std::shared_lock lock(mutex_);
  auto nearest = [&](const auto& map) -> std::shared_ptr<Allocation> {
    auto it = map.upper_bound(address);
    return it == map.begin() ? nullptr : std::prev(it)->second;
  };
  if (auto f = nearest(freed_); f && address < f->end) return "inside freed " + f->name;
  if (auto a = nearest(ranges_))
    return std::to_string(address - a->end) + " bytes behind the end of " + a->name + " of " +
           std::to_string(a->end - a->begin) + " bytes";
  auto next = ranges_.lower_bound(address);
  if (next != ranges_.end()) return std::to_string(next->first - address) + " bytes before " + next->second->name;
  return "no allocation is registered";
}

Allocations& allocations() {
  static Allocations* registry = new Allocations;  // outlives static destructors of host code
  return *registry;
}

}  // namespace ptxsim
