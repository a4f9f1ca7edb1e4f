// C++ interface of the simulator, beside the CUDA runtime functions it defines.
#pragma once
#include <cstdint>
#include <string>

#include "ptxsim/error.h"
#include "ptxsim/options.h"

namespace ptxsim {

/// Makes [p, p + bytes) known to memcheck, e.g. the storage of a CPU tensor. Ranges may overlap or be registered more
/// than once; each registration is undone by one unregister_range. With initialised = false, initcheck reports reads
/// before the first write.
void register_range(const void* p, uint64_t bytes, const std::string& name, bool initialised = true);
/// Undoes the latest registration that starts at p.
void unregister_range(const void* p);

/// The message of the last failed launch or runtime call of this process.
std::string last_error_message();

/// Counters per kernel name, summed over the launches since the last reset.
std::string stats_json();
std::string stats_table();  ///< the same for reading; PTXSIM_STATS=1 prints it at exit
void reset_totals();

}  // namespace ptxsim
