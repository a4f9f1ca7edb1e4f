// Control of the simulator inside libremora_sim.so, for ctypes: the simulator's own symbols are hidden there.
// Returned strings live until the next call of the same function by the same thread.
#pragma once

#define REMORA_SIM_API extern "C" __attribute__((visibility("default")))

/// Sets an option (sim/README.md lists them). Null, or why it was refused.
REMORA_SIM_API const char* remora_sim_set_option(const char* name, const char* value);

/// An option's present value as text; null if there is none of that name.
REMORA_SIM_API const char* remora_sim_option(const char* name);

/// Counters per kernel name, summed over the launches since the last reset, as JSON.
REMORA_SIM_API const char* remora_sim_stats_json();
REMORA_SIM_API void remora_sim_reset_stats();

/// What the last failed launch or runtime call said; empty if none has failed.
REMORA_SIM_API const char* remora_sim_last_error();
