#include "capi.h"

#include <string>

#include "ptxsim/ptxsim.h"

const char* remora_sim_set_option(const char* name, const char* value) {
  thread_local std::string message;
  try {
    ptxsim::options().set(name, value);
    return nullptr;
  } catch (const ptxsim::Error& e) {
    message = e.what();
    return message.c_str();
  }
}

const char* remora_sim_option(const char* name) {
  thread_local std::string value;
  try {
    value = ptxsim::options().get(name);
    return value.c_str();
  } catch (const ptxsim::Error&) {
    return nullptr;
  }
}

const char* remora_sim_stats_json() {
  thread_local std::string json;
  json = ptxsim::stats_json();
  return json.c_str();
}

void remora_sim_reset_stats() { ptxsim::reset_totals(); }

const char* remora_sim_last_error() {
  thread_local std::string message;
  message = ptxsim::last_error_message();
  return message.c_str();
}
