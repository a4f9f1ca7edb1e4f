#include "ptxsim/options.h"

#include <cctype>
#include <cstdlib>
#include <limits>

#include "ptxsim/error.h"

namespace ptxsim {
namespace {

/// One option: its name and how its value is read and written.
struct Entry {
  const char* name;
  void (*set)(Options&, const std::string& name, const std::string& value);
  std::string (*get)(const Options&);
};

template <class T>
T number(const std::string& name, const std::string& value) {
  char* end = nullptr;
  const uint64_t v = std::strtoull(value.c_str(), &end, 0);
  if (value.empty() || value[0] == '-' || *end || v > std::numeric_limits<T>::max())
    fail("option ", name, ": '", value, "' is not a number in range");
  return static_cast<T>(v);
}

bool boolean(const std::string& name, const std::string& value) {
  for (const char* yes : {"1", "true", "True", "on"})
    if (value == yes) return true;
  for (const char* no : {"0", "false", "False", "off", ""})
    if (value == no) return false;
  fail("option ", name, ": '", value, "' is not a boolean");
}

template <size_t N>
size_t word(const std::string& name, const std::string& value, const char* const (&allowed)[N]) {
  for (size_t i = 0; i < N; ++i)
    if (value == allowed[i]) return i;
  std::string list;
  for (const char* w : allowed) list += (list.empty() ? "" : ", ") + std::string(w);
  fail("option ", name, " is one of ", list, ", not '", value, "'");
}

template <auto Member>
constexpr Entry flag(const char* name) {
  return {name, [](Options& o, const std::string& n, const std::string& v) { o.*Member = boolean(n, v); },
          [](const Options& o) -> std::string { return o.*Member ? "1" : "0"; }};
}

template <auto Member>
constexpr Entry count(const char* name) {
  return {name,
          [](Options& o, const std::string& n, const std::string& v) {
            o.*Member = number<std::remove_reference_t<decltype(o.*Member)>>(n, v);
          },
          [](const Options& o) { return std::to_string(o.*Member); }};
}

constexpr const char* kAsync[] = {"early", "late"};
constexpr const char* kOrder[] = {"forward", "reverse", "random"};
constexpr const char* kMma[] = {"fma", "hardware"};

template <auto Member, const auto& Allowed>
constexpr Entry choice(const char* name) {
  return {name,
          [](Options& o, const std::string& n, const std::string& v) {
            using T = std::remove_reference_t<decltype(o.*Member)>;
            o.*Member = static_cast<T>(word(n, v, Allowed));
          },
          [](const Options& o) -> std::string { return Allowed[static_cast<size_t>(o.*Member)]; }};
}

void set_racecheck(Options& o, const std::string& name, const std::string& value) {
  if (value == "strict")
    o.racecheck = RaceCheck::strict;
  else
    o.racecheck = boolean(name, value) ? RaceCheck::on : RaceCheck::off;
}
std::string get_racecheck(const Options& o) {
  return o.racecheck == RaceCheck::strict ? "strict" : o.racecheck == RaceCheck::on ? "1" : "0";
}

void set_quantum(Options& o, const std::string& name, const std::string& value) {
  o.quantum = number<uint32_t>(name, value);
  if (!o.quantum) fail("option quantum must be positive");
}

void set_stats(Options& o, const std::string& name, const std::string& value) {
  o.stats = boolean(name, value);
  if (o.stats) o.memory_stats = true;
}

const Entry kEntries[] = {
    choice<&Options::async, kAsync>("async"),
    choice<&Options::warp_order, kOrder>("warp_order"),
    count<&Options::seed>("seed"),
    count<&Options::threads>("threads"),
    {"quantum", set_quantum, [](const Options& o) { return std::to_string(o.quantum); }},
    flag<&Options::memcheck>("memcheck"),
    {"racecheck", set_racecheck, get_racecheck},
    flag<&Options::initcheck>("initcheck"),
    flag<&Options::synccheck>("synccheck"),
    flag<&Options::memory_stats>("memory_stats"),
    {"stats", set_stats, [](const Options& o) -> std::string { return o.stats ? "1" : "0"; }},
    choice<&Options::mma, kMma>("mma"),
    count<&Options::approx_ulp>("approx_ulp"),
    count<&Options::max_warp_instructions>("max_warp_instructions"),
    count<&Options::arch>("arch"),
    count<&Options::num_sms>("num_sms"),
};

const Entry& entry(const std::string& name) {
  for (const Entry& e : kEntries)
    if (name == e.name) return e;
  fail("unknown option ", name);
}

}  // namespace

void Options::set(const std::string& name, const std::string& value) { entry(name).set(*this, name, value); }

std::string Options::get(const std::string& name) const { return entry(name).get(*this); }

std::vector<std::string> Options::names() {
  std::vector<std::string> out;
  for (const Entry& e : kEntries) out.emplace_back(e.name);
  return out;
}

Options Options::from_environment() {
  Options o;
  for (const std::string& name : names()) {
    std::string variable = "PTXSIM_";
    for (char c : name) variable += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    if (const char* value = std::getenv(variable.c_str())) o.set(name, value);
  }
  return o;
}

Options& options() {
  static Options* o = new Options(Options::from_environment());
  return *o;
}

}  // namespace ptxsim
