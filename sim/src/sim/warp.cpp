// Control flow of a warp.
//
// Scheduling policy: among the lane groups that can run, the one in the deepest
// activation and, there, at the lowest pc runs first; groups that come to the
// same place merge. Compilers lay code out so that a join point comes after the
// paths into it, so lowest-pc-first makes lanes wait for each other there, and
// yet, unlike a reconvergence stack, it never makes one lane's progress depend
// on another's leaving a loop: after kTurn instructions another group gets a
// turn, so spin-waits between lanes of a warp end, as on Volta and later.
#include "sim/warp.h"

#include <algorithm>

#include "ptxsim/error.h"
#include "sim/cta.h"
#include "sim/launch.h"
#include "sim/memory.h"

namespace ptxsim {
namespace {
constexpr uint32_t kTurn = 2048;
constexpr uint32_t kMaxLocalBytes = 512 * 1024;  // per thread, the hardware's limit
constexpr size_t kMaxRegisterBytes = 256u << 20;
}  // namespace

void Warp::reserve_registers(size_t bytes) {
  if (bytes <= registers_.size()) return;
  if (bytes > kMaxRegisterBytes) fault(*this, 0, "call stack overflow (unbounded recursion?)");
  registers_.resize(std::max(bytes, registers_.size() * 2), 0);
  set_frame(frame);
}

void Warp::reserve_local(uint32_t bytes) {
  local_used = std::max(local_used, bytes);
  if (bytes <= local_capacity) return;
  if (bytes > kMaxLocalBytes) fault(*this, 0, "local memory stack overflow");
  const uint32_t capacity = std::max(bytes, local_capacity * 2);
  std::vector<uint8_t> grown(size_t{capacity} * kWarpSize);
  for (uint32_t l = 0; l < kWarpSize && local_capacity; ++l)
    std::memcpy(grown.data() + size_t{l} * capacity, local_at(l, 0), local_capacity);
  local_memory = std::move(grown);
  local_capacity = capacity;
}

void Warp::set_frame(uint32_t f) {
  frame = f;
  bank[0] = registers_.data() + f;
}

const Inst& Warp::current() const { return program->code[pc == 0 ? 0 : pc - 1]; }

void Warp::start(Cta& owner, uint32_t warp_index, uint32_t lane_count) {
  cta = &owner;
  launch = owner.launch;
  program = launch->program;
  index = warp_index;
  populated = lane_count == kWarpSize ? kAllLanes : (1u << lane_count) - 1;
  const FunctionLayout& kernel = program->functions[0];
  reserve_registers(kernel.frame_bytes);
  set_frame(0);
  reserve_local(kernel.local_bytes);
  bank[1] = const_cast<uint8_t*>(program->constant_bytes.data());
  bank[2] = special_;
  pc = kernel.entry_pc;
  active = populated;
  init_special();
}

void Warp::init_special() {
  auto fill = [&](Special s, auto value_of_lane) {
    if (static_cast<uint32_t>(s) < kSpecial64Count) {
      auto* p = reinterpret_cast<uint64_t*>(special_ + special_offset(s));
      for (uint32_t l = 0; l < kWarpSize; ++l) p[l] = static_cast<uint64_t>(value_of_lane(l));
    } else {
      auto* p = reinterpret_cast<uint32_t*>(special_ + special_offset(s));
      for (uint32_t l = 0; l < kWarpSize; ++l) p[l] = static_cast<uint32_t>(value_of_lane(l));
    }
  };
  auto all = [&](Special s, uint64_t v) { fill(s, [v](uint32_t) { return v; }); };
  auto all3 = [&](Special x, const Dim3& d) {
    const auto i = static_cast<uint32_t>(x);
    all(x, d.x), all(static_cast<Special>(i + 1), d.y), all(static_cast<Special>(i + 2), d.z);
  };
  const Dim3 b = launch->block, g = launch->grid, c = launch->cluster;
  const uint32_t first = index * kWarpSize;
  all(Special::zero64, 0);
  all(Special::zero32, 0);
  all(Special::shared_base64, uint64_t{cta->rank} << kSharedRankShift);
  all(Special::param_base64, reinterpret_cast<uint64_t>(launch->params.data()));
  all(Special::gridid64, launch->id);
  fill(Special::tid_x, [&](uint32_t l) { return (first + l) % b.x; });
  fill(Special::tid_y, [&](uint32_t l) { return (first + l) / b.x % b.y; });
  fill(Special::tid_z, [&](uint32_t l) { return (first + l) / b.x / b.y; });
  all3(Special::ntid_x, b);
  all3(Special::ctaid_x, cta->id);
  all3(Special::nctaid_x, g);
  fill(Special::laneid, [](uint32_t l) { return l; });
  all(Special::warpid, index);
  all(Special::nwarpid, 64);
  all(Special::smid, cta->linear_id % 132);
  all(Special::nsmid, 132);
  fill(Special::lanemask_eq, [](uint32_t l) { return 1u << l; });
  fill(Special::lanemask_le, [](uint32_t l) { return (2u << l) - 1; });
  fill(Special::lanemask_lt, [](uint32_t l) { return (1u << l) - 1; });
  fill(Special::lanemask_ge, [](uint32_t l) { return ~((1u << l) - 1); });
  fill(Special::lanemask_gt, [](uint32_t l) { return ~((2u << l) - 1); });
  all3(Special::clusterid_x, cta->cluster->id);
  all3(Special::nclusterid_x, Dim3{g.x / c.x, g.y / c.y, g.z / c.z});
  all3(Special::cluster_ctaid_x, Dim3{cta->id.x % c.x, cta->id.y % c.y, cta->id.z % c.z});
  all3(Special::cluster_nctaid_x, c);
  all(Special::cluster_ctarank, cta->rank);
  all(Special::cluster_nctarank, c.count());
  all(Special::is_explicit_cluster, launch->explicit_cluster ? kAllLanes : 0);
  all(Special::total_smem_size, launch->shared_bytes);
  all(Special::dynamic_smem_size, launch->dynamic_shared);
  all(Special::aggr_smem_size, launch->shared_bytes);
  all(Special::reserved_smem_offset, 0);
  const auto workspace = launch->cooperative ? reinterpret_cast<uint64_t>(launch->grid_workspace) : 0;
  all(Special::envreg1, workspace >> 32);
  all(Special::envreg2, workspace);
}

// ---- the interpreter loop -----------------------------------------------------

uint32_t Warp::run(uint32_t quantum) {
  stop = polled = false;
  if (active == 0) reschedule();
  if (active == 0) return 0;
  const Inst* const code = program->code.data();
  uint64_t* const warp_count = cta->worker->stats.warp_count.data();
  uint64_t* const thread_count = cta->worker->stats.thread_count.data();
  uint32_t n = 0;
  for (; n < quantum && !stop; ++n) {
    if (pc == merge_pc_) [[unlikely]]
      reschedule();
    const Inst& in = code[pc];
    exec = active;
    if (in.guarded) exec &= *reinterpret_cast<const uint32_t*>(bank[0] + in.guard_offset) ^ in.guard_flip;
    ++warp_count[pc];
    thread_count[pc] += static_cast<uint32_t>(__builtin_popcount(exec));
    ++pc;
    if (exec) in.exec(*this, in);
  }
  executed += n;
  if (!others_.empty()) {
    turn_left_ = turn_left_ > n ? turn_left_ - n : 0;
    if (turn_left_ == 0) {
      rotating_ = !rotating_;
      if (rotating_)
        rotate();
      else
        reschedule();
    }
  }
  return n;
}

bool Warp::runnable() const {
  if (active) return true;
  return std::any_of(others_.begin(), others_.end(), [](const LaneGroup& g) { return g.wait == LaneGroup::ready; });
}

// ---- groups ---------------------------------------------------------------------

LaneGroup Warp::running() const { return {active, pc, frame, local, LaneGroup::ready, 0}; }

void Warp::resume(const LaneGroup& g) {
  active = g.mask;
  pc = g.pc;
  local = g.local;
  set_frame(g.frame);
}

/// Moves `mask` lanes of the running group to a group of their own at `at`.
void Warp::split(uint32_t mask, uint32_t at) {
  LaneGroup g = running();
  g.mask = mask;
  g.pc = at;
  others_.push_back(g);
  active &= ~mask;
}

/// Merges groups that stand at one place and picks the one to run.
void Warp::reschedule() {
  const LaneGroup previous = running();
  if (active) {
    others_.push_back(previous);
    active = 0;
  }
  for (size_t i = 0; i < others_.size(); ++i)
    for (size_t j = i + 1; j < others_.size();) {
      LaneGroup &a = others_[i], &b = others_[j];
      const bool mergeable = a.wait != LaneGroup::barrier && b.wait != LaneGroup::barrier;
      if (mergeable && a.same_place(b)) {
        a.mask |= b.mask;
        a.wait = LaneGroup::ready;  // more lanes have arrived: try again
        b = others_.back();
        others_.pop_back();
      } else {
        ++j;
      }
    }
  size_t best = others_.size();
  for (size_t i = 0; i < others_.size(); ++i) {
    const LaneGroup& g = others_[i];
    if (g.wait != LaneGroup::ready) continue;
    if (rotating_ && previous.mask && g.same_place(previous)) {
      best = i;
      break;
    }
    if (best == others_.size() || g.frame > others_[best].frame ||
        (g.frame == others_[best].frame && g.pc < others_[best].pc))
      best = i;
  }
  merge_pc_ = UINT32_MAX;
  if (best == others_.size()) {
    stop = true;  // every group waits
    return;
  }
  const LaneGroup chosen = others_[best];
  others_[best] = others_.back();
  others_.pop_back();
  resume(chosen);
  for (const LaneGroup& g : others_)
    if (g.frame == frame && g.wait != LaneGroup::barrier && g.pc > pc) merge_pc_ = std::min(merge_pc_, g.pc);
  if (turn_left_ == 0) turn_left_ = kTurn;
}

/// Fairness: lets the ready group that is not the policy's choice run a while.
void Warp::rotate() {
  turn_left_ = kTurn;
  for (LaneGroup& g : others_) {
    if (g.wait != LaneGroup::ready) continue;
    const LaneGroup chosen = g;
    if (active)
      g = running();
    else {
      g = others_.back();
      others_.pop_back();
    }
    resume(chosen);
    std::rotate(others_.begin(), others_.begin() + 1, others_.end());
    merge_pc_ = UINT32_MAX;
    return;
  }
}

void Warp::branch(uint32_t target) {
  const uint32_t rest = active & ~exec;
  if (rest) {
    ++cta->worker->stats.divergent_branches;
    split(rest, pc);
    turn_left_ = kTurn;
  }
  pc = target;
  if (!others_.empty()) reschedule();
}

void Warp::branch_each(const uint32_t* target) {
  uint32_t todo = exec;
  const uint32_t rest = active & ~exec;
  if (rest) split(rest, pc);
  while (todo) {
    const uint32_t first = target[__builtin_ctz(todo)];
    uint32_t same = 0;
    for_lanes(todo, [&](uint32_t l) { same |= uint32_t{target[l] == first} << l; });
    todo &= ~same;
    if (todo) {
      split(same, first);
      turn_left_ = kTurn;
    } else {
      pc = first;
    }
  }
  if (!others_.empty()) {
    ++cta->worker->stats.divergent_branches;
    reschedule();
  }
}

// ---- calls ----------------------------------------------------------------------

/// Builds the activation of `function` for `mask` lanes of the running group.
void Warp::enter(uint32_t function, uint32_t site, uint32_t mask, uint32_t return_pc, LaneGroup& out) {
  const FunctionLayout& callee = program->functions[function];
  const FunctionLayout* caller = nullptr;
  for (const FunctionLayout& f : program->functions)
    if (return_pc > f.entry_pc && return_pc <= f.end_pc) caller = &f;
  if (!caller) fault(*this, 0, "internal error: call from outside any function");
  const uint32_t new_frame = frame + caller->frame_bytes;
  const uint32_t new_local = local + caller->local_bytes;
  reserve_registers(size_t{new_frame} + callee.frame_bytes);
  reserve_local(new_local + callee.local_bytes);
  auto* header = reinterpret_cast<FrameHeader*>(registers_.data() + new_frame);
  const CallSite& call_site = program->call_sites[site];
  const ast::Function& fn = *callee.source;
  if (call_site.args.size() != fn.params.size()) fault(*this, 0, "call passes a wrong number of arguments");
  for_lanes(mask, [&](uint32_t l) {
    header->return_pc[l] = return_pc;
    header->caller_frame[l] = frame;
    header->caller_local[l] = local;
    header->call_site[l] = site;
    for (size_t i = 0; i < fn.params.size(); ++i) {
      const auto& formal = fn.variables[fn.params[i]];
      std::memcpy(local_at(l, new_local + callee.variable_offset[fn.params[i]]),
                  local_at(l, local + call_site.args[i].offset),
                  std::min<uint64_t>(formal.size, call_site.args[i].size));
    }
  });
  out = {mask, callee.entry_pc, new_frame, new_local, LaneGroup::ready, 0};
}

void Warp::call(uint32_t function, uint32_t site) {
  LaneGroup callee;
  enter(function, site, exec, pc, callee);
  const uint32_t rest = active & ~exec;
  if (rest) split(rest, pc), turn_left_ = kTurn;
  active = 0;
  if (others_.empty()) {
    resume(callee);
    merge_pc_ = UINT32_MAX;
  } else {
    others_.push_back(callee);
    reschedule();
  }
}

void Warp::call_each(const uint32_t* function, uint32_t site) {
  const uint32_t rest = active & ~exec;
  uint32_t todo = exec;
  std::vector<LaneGroup> callees;
  while (todo) {
    const uint32_t first = function[__builtin_ctz(todo)];
    uint32_t same = 0;
    for_lanes(todo, [&](uint32_t l) { same |= uint32_t{function[l] == first} << l; });
    todo &= ~same;
    enter(first, site, same, pc, callees.emplace_back());
  }
  if (rest) split(rest, pc);
  active = 0;
  others_.insert(others_.end(), callees.begin(), callees.end());
  turn_left_ = kTurn;
  reschedule();
}

void Warp::return_lanes() {
  if (frame == 0) return exit_lanes();
  const uint32_t rest = active & ~exec;
  const auto header = *reinterpret_cast<const FrameHeader*>(bank[0]);
  const FunctionLayout* callee = nullptr;
  for (const FunctionLayout& f : program->functions)
    if (pc > f.entry_pc && pc <= f.end_pc) callee = &f;
  const ast::Function& fn = *callee->source;
  std::vector<LaneGroup> groups;
  for_lanes(exec, [&](uint32_t l) {
    const CallSite& site = program->call_sites[header.call_site[l]];
    for (size_t i = 0; i < fn.results.size() && i < site.results.size(); ++i)
      std::memcpy(local_at(l, header.caller_local[l] + site.results[i].offset),
                  local_at(l, local + callee->variable_offset[fn.results[i]]), site.results[i].size);
    const LaneGroup back{1u << l, header.return_pc[l], header.caller_frame[l], header.caller_local[l], LaneGroup::ready,
                         0};
    auto same = std::find_if(groups.begin(), groups.end(), [&](const LaneGroup& g) { return g.same_place(back); });
    if (same != groups.end())
      same->mask |= back.mask;
    else
      groups.push_back(back);
  });
  if (rest) split(rest, pc);
  active = 0;
  if (others_.empty() && groups.size() == 1) {
    resume(groups[0]);
    return;
  }
  others_.insert(others_.end(), groups.begin(), groups.end());
  if (turn_left_ == 0) turn_left_ = kTurn;
  reschedule();
}

void Warp::exit_lanes() {
  exited |= exec;
  active &= ~exec;
  for (LaneGroup& g : others_)
    if (g.wait == LaneGroup::lanes) g.wait = LaneGroup::ready;  // fewer lanes to wait for
  if (!active) {
    if (!others_.empty())
      reschedule();
    else
      stop = true;
  }
  cta->barrier_recheck();
  cta->cluster->barrier_check();
}

// ---- waiting ------------------------------------------------------------------------

void Warp::wait_for_lanes() {
  LaneGroup g = running();
  --g.pc;
  g.wait = LaneGroup::lanes;
  others_.push_back(g);
  active = 0;
  if (turn_left_ == 0) turn_left_ = kTurn;
  reschedule();
  if (active == 0)
    fault(*this, static_cast<uint32_t>(__builtin_ctz(g.mask)),
          "warp-synchronous instruction waits for lanes that never arrive (not all lanes of its member mask "
          "execute it)");
}

bool Warp::others_ready() const {
  return std::any_of(others_.begin(), others_.end(), [](const LaneGroup& g) { return g.wait == LaneGroup::ready; });
}

void Warp::wait_at_barrier(uint8_t id) {
  LaneGroup g = running();
  g.mask = exec;
  g.wait = LaneGroup::barrier;
  g.barrier_id = id;
  others_.push_back(g);
  active &= ~exec;
  if (active) return;
  if (others_.size() == 1) {
    stop = true;
    return;
  }
  if (!others_ready())  // lanes that waited for these to join them must look again
    for (LaneGroup& other : others_)
      if (other.wait == LaneGroup::lanes) other.wait = LaneGroup::ready;
  reschedule();
}

void Warp::release_barrier(uint8_t id) {
  for (LaneGroup& g : others_)
    if (g.wait == LaneGroup::barrier && g.barrier_id == id) g.wait = LaneGroup::ready;
  if (others_.size() == 1 && active == 0) {  // the usual case: the whole warp waited
    const LaneGroup g = others_[0];
    if (g.wait == LaneGroup::ready) {
      others_.clear();
      resume(g);
      merge_pc_ = UINT32_MAX;
    }
  }
}

uint32_t Warp::lanes_at_barrier(uint8_t id) const {
  uint32_t lanes = 0;
  for (const LaneGroup& g : others_)
    if (g.wait == LaneGroup::barrier && g.barrier_id == id) lanes |= g.mask;
  return lanes;
}

std::vector<LaneGroup> Warp::positions() const {
  std::vector<LaneGroup> out = others_;
  if (active) out.push_back(running());
  return out;
}

}  // namespace ptxsim
