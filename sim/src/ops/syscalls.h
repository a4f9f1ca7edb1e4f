// Functions the CUDA driver provides to device code: vprintf, malloc, ...
#pragma once
#include <string_view>

#include "sim/program.h"

namespace ptxsim {
/// The handler of a call of `name`, or null if it is an ordinary function.
Handler find_syscall(std::string_view name);
}  // namespace ptxsim
