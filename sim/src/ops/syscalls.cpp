#include "ops/syscalls.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#include "check/allocations.h"
#include "sim/memory.h"

namespace ptxsim {
namespace {

std::mutex output_mutex;

template <class T>
T argument(Warp& w, const CallSite& site, uint32_t lane, size_t i) {
  T v;
  std::memcpy(&v, w.local_at(lane, w.local + site.args.at(i).offset), sizeof(T));
  return v;
}
template <class T>
void result(Warp& w, const CallSite& site, uint32_t lane, T v) {
  if (!site.results.empty()) std::memcpy(w.local_at(lane, w.local + site.results[0].offset), &v, sizeof(T));
}

std::string device_string(Warp& w, uint32_t lane, uint64_t address) {
  return reinterpret_cast<const char*>(resolve(w, Space::generic, address, 1, lane, true));
}

/// Arguments lie packed at their natural alignment; floats are promoted to double.
std::string format(Warp& w, uint32_t lane, const std::string& fmt, uint64_t args) {
  std::string out;
  uint64_t offset = 0;
  auto fetch = [&](unsigned bytes) {
    offset = (offset + bytes - 1) / bytes * bytes;
    uint64_t v = 0;
    std::memcpy(&v, resolve(w, Space::generic, args + offset, bytes, lane, true), bytes);
    offset += bytes;
    return v;
  };
  for (size_t i = 0; i < fmt.size(); ++i) {
    if (fmt[i] != '%') {
      out += fmt[i];
      continue;
    }
    std::string spec = "%";
    bool wide = false;
    for (++i; i < fmt.size(); ++i) {
      const char c = fmt[i];
      if (c == 'l' || c == 'j' || c == 'z' || c == 't') {
        wide = true;
        continue;
      }
      if (c == 'h') continue;
      if (c == '*') {
        spec += std::to_string(static_cast<int>(fetch(4)));
        continue;
      }
      spec += c;
      if (!std::strchr("0123456789.+-# ", c)) break;
    }
    const char conversion = spec.back();
    char buffer[512];
    switch (conversion) {
      case '%':
        out += '%';
        break;
      case 's':
        std::snprintf(buffer, sizeof buffer, spec.c_str(), device_string(w, lane, fetch(8)).c_str());
        out += buffer;
        break;
      case 'p':
        std::snprintf(buffer, sizeof buffer, spec.c_str(), reinterpret_cast<void*>(fetch(8)));
        out += buffer;
        break;
      case 'a':
      case 'A':
      case 'e':
      case 'E':
      case 'f':
      case 'F':
      case 'g':
      case 'G':
        std::snprintf(buffer, sizeof buffer, spec.c_str(), __builtin_bit_cast(double, fetch(8)));
        out += buffer;
        break;
      case 'd':
      case 'i':
        spec.insert(spec.size() - 1, "ll");
        std::snprintf(buffer, sizeof buffer, spec.c_str(),
                      wide ? static_cast<long long>(fetch(8)) : static_cast<long long>(static_cast<int32_t>(fetch(4))));
        out += buffer;
        break;
      case 'u':
      case 'x':
      case 'X':
      case 'o':
        spec.insert(spec.size() - 1, "ll");
        std::snprintf(buffer, sizeof buffer, spec.c_str(), static_cast<unsigned long long>(fetch(wide ? 8 : 4)));
        out += buffer;
        break;
      case 'c':
        out += static_cast<char>(fetch(4));
        break;
      default:
        fault(w, lane, "printf conversion " + spec);
    }
  }
  return out;
}

void exec_vprintf(Warp& w, const Inst& in) {
  const CallSite& site = w.program->call_sites[in.imm[0]];
  const std::lock_guard lock(output_mutex);
  for_lanes(w.exec, [&](uint32_t l) {
    const std::string text =
        format(w, l, device_string(w, l, argument<uint64_t>(w, site, l, 0)), argument<uint64_t>(w, site, l, 1));
    std::fwrite(text.data(), 1, text.size(), stdout);
    result<int32_t>(w, site, l, static_cast<int32_t>(text.size()));
  });
  std::fflush(stdout);
}

void exec_assertfail(Warp& w, const Inst& in) {
  const CallSite& site = w.program->call_sites[in.imm[0]];
  const auto l = static_cast<uint32_t>(__builtin_ctz(w.exec));
  fault(w, l,
        "device assertion `" + device_string(w, l, argument<uint64_t>(w, site, l, 0)) + "' failed at " +
            device_string(w, l, argument<uint64_t>(w, site, l, 1)) + ":" +
            std::to_string(argument<uint32_t>(w, site, l, 2)));
}

void exec_malloc(Warp& w, const Inst& in) {
  const CallSite& site = w.program->call_sites[in.imm[0]];
  for_lanes(w.exec, [&](uint32_t l) {
    const auto bytes = argument<uint64_t>(w, site, l, 0);
    void* p = std::aligned_alloc(16, (bytes + 31) / 16 * 16);
    allocations().add(p, bytes, "device malloc", false);
    result(w, site, l, reinterpret_cast<uint64_t>(p));
  });
}
void exec_free(Warp& w, const Inst& in) {
  const CallSite& site = w.program->call_sites[in.imm[0]];
  for_lanes(w.exec, [&](uint32_t l) {
    auto* p = reinterpret_cast<void*>(argument<uint64_t>(w, site, l, 0));
    if (!p) return;
    allocations().remove(p, true);
    std::free(p);
  });
}

}  // namespace

Handler find_syscall(std::string_view name) {
  if (name == "vprintf") return exec_vprintf;
  if (name == "__assertfail") return exec_assertfail;
  if (name == "malloc") return exec_malloc;
  if (name == "free") return exec_free;
  return nullptr;
}

}  // namespace ptxsim
