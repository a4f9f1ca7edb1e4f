// Distributes the clusters of a grid over host threads.
#include "sim/launch.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <thread>

#include "check/allocations.h"
#include "check/traffic.h"
#include "ptxsim/error.h"
#include "sim/crash.h"
#include "sim/cta.h"

namespace ptxsim {
namespace {

// Clusters one worker keeps resident at most when they spin on each other; a
// cooperative launch has all of them resident.
constexpr size_t kMaxResident = 4096;

std::unique_ptr<Cluster> open_cluster(Launch& launch, Worker& worker, uint64_t number) {
  auto cluster = std::make_unique<Cluster>();
  cluster->launch = &launch;
  const Dim3 c = launch.cluster;
  const Dim3 n{launch.grid.x / c.x, launch.grid.y / c.y, launch.grid.z / c.z};
  cluster->id = {static_cast<uint32_t>(number % n.x), static_cast<uint32_t>(number / n.x % n.y),
                 static_cast<uint32_t>(number / n.x / n.y)};
  for (uint32_t rank = 0; rank < c.count(); ++rank) {
    auto cta = std::make_unique<Cta>();
    cta->launch = &launch;
    cta->cluster = cluster.get();
    cta->worker = &worker;
    cta->rank = rank;
    cta->id = {cluster->id.x * c.x + rank % c.x, cluster->id.y * c.y + rank / c.x % c.y,
               cluster->id.z * c.z + rank / c.x / c.y};
    cta->linear_id = (uint64_t{cta->id.z} * launch.grid.y + cta->id.y) * launch.grid.x + cta->id.x;
    cluster->ctas.push_back(std::move(cta));
  }
  for (auto& cta : cluster->ctas) {
    cta->start();
    worker.stats.ctas += 1;
    worker.stats.warps += cta->warps.size();
    worker.stats.threads += launch.block.count();
  }
  return cluster;
}

/// Clusters start in order, one at a time; another one becomes resident only
/// when those that are wait for something outside themselves. That keeps the
/// working set small and still lets inter-CTA waits (look-back, grid sync) end.
void work(Launch& launch, Worker& worker) {
  const uint64_t total = launch.grid.count() / launch.cluster.count();
  std::deque<std::unique_ptr<Cluster>> resident;
  auto open_next = [&] {
    const uint64_t number = launch.next_cluster.fetch_add(1);
    if (number >= total) return false;
    resident.push_back(open_cluster(launch, worker, number));
    return true;
  };
  while (!launch.failed.load(std::memory_order_relaxed)) {
    if (resident.empty() && !open_next()) return;
    bool waits = false;
    for (size_t i = 0; i < resident.size();) {
      if (resident[i]->slice()) {
        resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(i));
        continue;
      }
      waits |= resident[i]->strong_accesses > 0;
      ++i;
      if (launch.failed.load(std::memory_order_relaxed)) return;
    }
    if (waits && resident.size() < kMaxResident && !open_next()) std::this_thread::yield();
  }
}

void work_guarded(Launch& launch, Worker& worker) {
  const CrashContext context(launch);
  try {
    work(launch, worker);
  } catch (const std::exception& e) {
    const std::lock_guard lock(launch.error_mutex);
    if (!launch.failed.exchange(true)) launch.error = e.what();
  }
}

void validate(const Launch& l) {
  const Program& p = *l.program;
  const uint64_t threads = l.block.count();
  if (threads == 0 || threads > 1024) fail("invalid block size: ", threads, " threads");
  if (l.grid.count() == 0) fail("invalid grid: empty");
  if (l.grid.x % l.cluster.x || l.grid.y % l.cluster.y || l.grid.z % l.cluster.z)
    fail("grid is not a multiple of the cluster size");
  if (p.max_threads && threads > p.max_threads)
    fail("kernel ", p.kernel, " is compiled for at most ", p.max_threads, " threads per block, launched with ",
         threads);
  if (p.required_threads[0] && threads != p.max_threads)
    fail("kernel ", p.kernel, " requires exactly ", p.max_threads, " threads per block, launched with ", threads);
  if (l.params.size() < p.param_bytes) fail("kernel ", p.kernel, ": parameter buffer too small");
}

}  // namespace

LaunchStats run_launch(Launch& launch) {
  const auto begin = std::chrono::steady_clock::now();
  const Program& p = *launch.program;
  validate(launch);
  const uint32_t align = std::max<uint32_t>(p.dynamic_shared_align, 16);
  launch.dynamic_shared_offset = (kReservedShared + p.static_shared_bytes + align - 1) / align * align;
  launch.shared_bytes = launch.dynamic_shared_offset + launch.dynamic_shared;
  if (launch.cooperative)
    allocations().add(launch.grid_workspace, sizeof launch.grid_workspace, "grid workspace", true);
  launch.observe = launch.options.any_checker() || launch.options.memory_stats;

  uint32_t threads = launch.options.threads ? launch.options.threads : std::thread::hardware_concurrency();
  threads =
      static_cast<uint32_t>(std::min<uint64_t>(std::max(threads, 1u), launch.grid.count() / launch.cluster.count()));
  std::vector<Worker> workers(threads);
  for (Worker& w : workers) {
    w.stats.warp_count.assign(p.code.size(), 0);
    w.stats.thread_count.assign(p.code.size(), 0);
    if (launch.options.memory_stats) w.traffic = std::make_unique<TrafficCounter>();
  }
  std::vector<std::thread> pool;
  for (uint32_t i = 1; i < threads; ++i) pool.emplace_back(work_guarded, std::ref(launch), std::ref(workers[i]));
  work_guarded(launch, workers[0]);
  for (std::thread& t : pool) t.join();
  if (launch.cooperative) allocations().remove(launch.grid_workspace);
  if (launch.failed) fail(launch.error);

  LaunchStats total;
  for (Worker& w : workers) {
    total.add(w.stats);
  }
  if (launch.options.memory_stats) merge_footprints(workers, total);
  for (const auto& [pc, work] : p.mma_work)
    if (total.warp_count[pc]) total.mma_flops[type_name(work.type)] += total.warp_count[pc] * work.flops;
  total.launches = 1;
  total.shared_bytes = launch.shared_bytes - kReservedShared;
  total.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return total;
}

}  // namespace ptxsim
