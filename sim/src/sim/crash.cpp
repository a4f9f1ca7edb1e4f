#include "sim/crash.h"

#include <unistd.h>
#include <csignal>
#include <cstdio>
#include <mutex>
#include <string>

#include "sim/cta.h"

namespace ptxsim {
namespace {

thread_local const Warp* running_warp = nullptr;
struct sigaction previous_action;

// Not async-signal-safe in the letter (it allocates), but the process is about
// to die and a message naming the instruction is worth the risk.
void on_segv(int signal_number, siginfo_t* info, void* context) {
  if (const Warp* w = running_warp) {
    running_warp = nullptr;
    const auto pc = static_cast<uint32_t>(&w->current() - w->program->code.data());
    const std::string text = "ptxsim: invalid memory access at host address " +
                             std::to_string(reinterpret_cast<uintptr_t>(info->si_addr)) + "\n  at " +
                             w->program->where(pc) + "\n  block (" + std::to_string(w->cta->id.x) + "," +
                             std::to_string(w->cta->id.y) + "," + std::to_string(w->cta->id.z) + ") warp " +
                             std::to_string(w->index) + "\n  PTXSIM_MEMCHECK=1 gives the thread and address\n";
    (void)!write(2, text.data(), text.size());
  }
  if (previous_action.sa_flags & SA_SIGINFO) {
    if (previous_action.sa_sigaction) return previous_action.sa_sigaction(signal_number, info, context);
  }
  sigaction(SIGSEGV, &previous_action, nullptr);  // return and fault again, for the default action
}

}  // namespace

CrashContext::CrashContext(const Launch&) {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_segv;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous_action);
  });
}

CrashContext::~CrashContext() { running_warp = nullptr; }

void set_running_warp(const Warp* w) { running_warp = w; }

}  // namespace ptxsim
