#include "ops/space.h"

namespace ptxsim {

Space take_space(Decode& d) {
  const auto s = d.pick(
      {"global", "const", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry", "param::func"});
  if (s == "global") return Space::global;
  if (s == "const") return Space::constant;
  if (s == "shared::cluster") d.inst.mem.cluster = true;
  if (s.substr(0, 6) == "shared") return Space::shared;
  if (s == "local") return Space::local;
  if (s.substr(0, 5) == "param") return Space::param;
  return Space::generic;
}

bool take_cache_hints(Decode& d) {
  while (!d.pick({"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_normal", "L1::evict_unchanged",
                  "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::evict_normal", "L2::evict_first",
                  "L2::evict_last", "L2::64B", "L2::128B", "L2::256B"})
              .empty()) {
  }
  return d.flag("L2::cache_hint");
}

void take_ordering(Decode& d) {
  const auto order = d.pick({"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"});
  if (order == "mmio") d.unsupported("mmio");
  d.pick({"cta", "cluster", "gpu", "sys"});
  d.inst.mem.volatile_or_relaxed = !order.empty() && order != "weak";
}

}  // namespace ptxsim
