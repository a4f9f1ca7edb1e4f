#include "sim/stats.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <sstream>

#include "ptxsim/ptxsim.h"

namespace ptxsim {
namespace {

std::mutex totals_mutex;
std::map<std::string, KernelTotals>& totals() {
  static auto* t = new std::map<std::string, KernelTotals>;  // printed at exit
  return *t;
}

void add(GlobalTraffic& a, const GlobalTraffic& b) {
  a.requests += b.requests, a.sectors += b.sectors, a.ideal_sectors += b.ideal_sectors, a.bytes += b.bytes;
}
void add(SharedTraffic& a, const SharedTraffic& b) {
  a.requests += b.requests, a.wavefronts += b.wavefronts, a.ideal_wavefronts += b.ideal_wavefronts, a.bytes += b.bytes;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  if (!text) return name;  // a name of Triton or of extern "C"
  std::string out = text;
  std::free(text);
  return out;
}

uint64_t sum(const std::vector<uint64_t>& v) {
  uint64_t n = 0;
  for (uint64_t x : v) n += x;
  return n;
}

}  // namespace

uint64_t LaunchStats::total_warps() const { return sum(warp_count); }
uint64_t LaunchStats::total_threads() const { return sum(thread_count); }

uint64_t LaunchStats::class_warps(const Program& p, InstClass c) const {
  uint64_t n = 0;
  for (size_t i = 0; i < warp_count.size(); ++i)
    if (p.code[i].klass == c) n += warp_count[i];
  return n;
}

void LaunchStats::add(const LaunchStats& o) {
  launches += o.launches, ctas += o.ctas, warps += o.warps, threads += o.threads;
  if (warp_count.size() < o.warp_count.size()) {
    warp_count.resize(o.warp_count.size(), 0);
    thread_count.resize(o.thread_count.size(), 0);
  }
  for (size_t i = 0; i < o.warp_count.size(); ++i) {
    warp_count[i] += o.warp_count[i];
    thread_count[i] += o.thread_count[i];
  }
  divergent_branches += o.divergent_branches;
  barriers += o.barriers;
  ptxsim::add(global_load, o.global_load);
  ptxsim::add(global_store, o.global_store);
  ptxsim::add(shared_load, o.shared_load);
  ptxsim::add(shared_store, o.shared_store);
  async_copy_bytes += o.async_copy_bytes;
  atomic_lanes += o.atomic_lanes;
  distinct_load_bytes += o.distinct_load_bytes;
  distinct_store_bytes += o.distinct_store_bytes;
  max_local_bytes = std::max(max_local_bytes, o.max_local_bytes);
  shared_bytes = std::max(shared_bytes, o.shared_bytes);
  seconds += o.seconds;
  for (const auto& [type, flops] : o.mma_flops) mma_flops[type] += flops;
}

std::map<std::string, std::pair<uint64_t, uint64_t>> classes_of(const Program& program, const LaunchStats& stats) {
  std::map<std::string, std::pair<uint64_t, uint64_t>> classes;
  for (size_t i = 0; i < stats.warp_count.size(); ++i) {
    if (!stats.warp_count[i]) continue;
    auto& c = classes[inst_class_name(program.code[i].klass)];
    c.first += stats.warp_count[i];
    c.second += stats.thread_count[i];
  }
  return classes;
}

void accumulate(const Program& program, const LaunchStats& stats) {
  const std::lock_guard lock(totals_mutex);
  KernelTotals& t = totals()[demangled(program.kernel)];
  t.stats.add(stats);
  for (const auto& [name, n] : classes_of(program, stats)) {
    t.classes[name].first += n.first;
    t.classes[name].second += n.second;
  }
}

std::map<std::string, KernelTotals> kernel_totals() {
  const std::lock_guard lock(totals_mutex);
  return totals();
}

void reset_totals() {
  const std::lock_guard lock(totals_mutex);
  totals().clear();
}

std::string to_json(const KernelTotals& k) {
  const LaunchStats& s = k.stats;
  std::ostringstream out;
  const char* separator = "{";
  auto key = [&](const char* name) -> std::ostream& {
    out << separator << '"' << name << "\": ";
    separator = ", ";
    return out;
  };
  auto object = [&](const char* name, const auto& fields) {
    key(name) << '{';
    const char* comma = "";
    for (const auto& [field, value] : fields) {
      out << comma << '"' << field << "\": " << value;
      comma = ", ";
    }
    out << '}';
  };
  using Fields = std::initializer_list<std::pair<const char*, uint64_t>>;
  auto global = [&](const char* name, const GlobalTraffic& t) {
    object(
        name,
        Fields{
            {"requests", t.requests}, {"sectors", t.sectors}, {"ideal_sectors", t.ideal_sectors}, {"bytes", t.bytes}});
  };
  auto shared = [&](const char* name, const SharedTraffic& t) {
    object(name, Fields{{"requests", t.requests},
                        {"wavefronts", t.wavefronts},
                        {"excess_wavefronts", t.wavefronts - t.ideal_wavefronts},
                        {"bytes", t.bytes}});
  };
  auto classes = [&](const char* name, auto member) {
    std::map<std::string, uint64_t> fields;
    for (const auto& [klass, n] : k.classes) fields[klass] = n.*member;
    object(name, fields);
  };
  using Counts = std::pair<uint64_t, uint64_t>;
  key("launches") << s.launches;
  key("ctas") << s.ctas;
  key("warps") << s.warps;
  key("threads") << s.threads;
  key("warp_instructions") << s.total_warps();
  key("thread_instructions") << s.total_threads();
  classes("warp_instructions_by_class", &Counts::first);
  classes("thread_instructions_by_class", &Counts::second);
  key("divergent_branches") << s.divergent_branches;
  key("barriers") << s.barriers;
  global("global_load", s.global_load);
  global("global_store", s.global_store);
  key("global_load_footprint") << s.distinct_load_bytes;
  key("global_store_footprint") << s.distinct_store_bytes;
  shared("shared_load", s.shared_load);
  shared("shared_store", s.shared_store);
  key("async_copy_bytes") << s.async_copy_bytes;
  key("atomic_lanes") << s.atomic_lanes;
  object("mma_flops", s.mma_flops);
  key("max_local_bytes") << s.max_local_bytes;
  key("shared_bytes") << s.shared_bytes;
  key("seconds") << s.seconds;
  out << '}';
  return out.str();
}

std::string stats_json() {
  std::ostringstream out;
  out << '{';
  const char* separator = "";
  for (const auto& [name, k] : kernel_totals()) {
    out << separator << '"' << name << "\": " << to_json(k);
    separator = ", ";
  }
  out << '}';
  return out.str();
}

std::string stats_table() {
  std::string out;
  char line[256];
  auto row = [&](const char* name, unsigned long long v) {
    std::snprintf(line, sizeof line, "    %-28s %18llu\n", name, v);
    if (v) out += line;
  };
  for (const auto& [name, k] : kernel_totals()) {
    const LaunchStats& s = k.stats;
    out += "ptxsim: " + name + "\n";
    row("launches", s.launches);
    row("CTAs", s.ctas);
    row("threads", s.threads);
    row("warp instructions", s.total_warps());
    row("thread instructions", s.total_threads());
    for (const auto& [klass, n] : k.classes) row(("  " + klass).c_str(), n.first);
    row("divergent branches", s.divergent_branches);
    row("barriers", s.barriers);
    row("global load requests", s.global_load.requests);
    row("global load sectors", s.global_load.sectors);
    row("global load sectors, ideal", s.global_load.ideal_sectors);
    row("global load bytes", s.global_load.bytes);
    row("global load bytes, distinct", s.distinct_load_bytes);
    row("global store requests", s.global_store.requests);
    row("global store sectors", s.global_store.sectors);
    row("global store sectors, ideal", s.global_store.ideal_sectors);
    row("global store bytes", s.global_store.bytes);
    row("global store bytes, distinct", s.distinct_store_bytes);
    row("shared load wavefronts", s.shared_load.wavefronts);
    row("shared load excess", s.shared_load.wavefronts - s.shared_load.ideal_wavefronts);
    row("shared store wavefronts", s.shared_store.wavefronts);
    row("shared store excess", s.shared_store.wavefronts - s.shared_store.ideal_wavefronts);
    row("async copy bytes", s.async_copy_bytes);
    row("atomic lanes", s.atomic_lanes);
    for (const auto& [type, flops] : s.mma_flops) row(("mma flops " + type).c_str(), flops);
    row("max local bytes per thread", s.max_local_bytes);
    row("shared bytes per CTA", s.shared_bytes);
    row("host time, us", static_cast<unsigned long long>(s.seconds * 1e6));
  }
  return out;
}

}  // namespace ptxsim
