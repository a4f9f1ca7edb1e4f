// How a CPU kernel asks for threads. The binding passes PyTorch's own pool, so torch.set_num_threads holds.
#pragma once
#include <cstdint>
#include <functional>

namespace remora {

/// Runs body(begin, end) on disjoint subranges that together cover [0, size), each at least `grain` long.
using ParallelFor = void (*)(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace remora
