// A warp-specialised kernel: two warps copy tiles into a ring of two stages, two warps read them; named barriers hand
// the stages over. argv[1] names a planted bug, or "none".
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

constexpr int kTiles = 7, kTile = 256, kStages = 2, kThreads = 128;
constexpr int kFull = 1, kEmpty = kFull + kStages;  // barrier numbers

enum Bug { kNone, kNoCopyWait, kWrongGroup, kNoEmptyWait, kNoFullWait, kWrongStage, kNoArrive, kCount, kBugs };
const char* const kNames[] = {"none",         "no_copy_wait", "wrong_group", "no_empty_wait",
                              "no_full_wait", "wrong_stage",  "no_arrive",   "count"};

__device__ void sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ void arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <Bug B>
__global__ void ring(const float* x, float* y) {
  __shared__ alignas(16) float stage[kStages][kTile];
  const int t = threadIdx.x % 64;
  if (threadIdx.x < 64) {
    for (int tile = 0; tile <= kTiles; ++tile) {
      if (tile < kTiles) {
        const int s = tile % kStages;
        if (tile >= kStages && B != kNoEmptyWait) sync(kEmpty + s, kThreads);
        __pipeline_memcpy_async(&stage[s][4 * t], x + tile * kTile + 4 * t, 16);
      }
      __pipeline_commit();
      if (tile == 0) continue;
      // The copy of the tile before is done; the present one goes on.
      if (B == kWrongGroup)
        __pipeline_wait_prior(2);
      else if (B != kNoCopyWait)
        __pipeline_wait_prior(1);
      arrive(kFull + (B == kWrongStage ? tile : tile - 1) % kStages, kThreads);
    }
  } else {
    float sum = 0;
    for (int tile = 0; tile < kTiles; ++tile) {
      const int s = tile % kStages;
      if (B != kNoFullWait) sync(kFull + s, B == kCount ? 64 : kThreads);
      for (int i = 0; i < 4; ++i) sum += (i + 1) * stage[s][kTile - 1 - (64 * i + t)];
      if (tile + kStages < kTiles && B != kNoArrive) arrive(kEmpty + s, kThreads);
    }
    y[t] = sum;
  }
}

/// All warps store one value each to the same word; `Same`: all the same one.
template <bool Same>
__global__ void together(float* y, float value) {
  __shared__ float word;
  word = Same ? value : value + threadIdx.x / 32;
  __syncthreads();
  y[threadIdx.x] = word;
}

template <Bug B = kNone>
void run(const char* name, const float* x, float* y) {
  if (std::strcmp(name, kNames[B]) == 0) ring<B><<<1, kThreads>>>(x, y);
  if constexpr (B + 1 < kBugs) run<static_cast<Bug>(B + 1)>(name, x, y);
}

int main(int, char** argv) {
  float host[kTiles * kTile], result[kThreads] = {};
  for (int i = 0; i < kTiles * kTile; ++i) host[i] = static_cast<float>(i % 13);
  float *x, *y;
  cudaMalloc(&x, sizeof host);
  cudaMalloc(&y, sizeof result);
  cudaMemcpy(x, host, sizeof host, cudaMemcpyHostToDevice);
  const bool words = std::strncmp(argv[1], "together", 8) == 0;
  if (words && argv[1][8] == '_')
    together<false><<<1, kThreads>>>(y, 1.f);
  else if (words)
    together<true><<<1, kThreads>>>(y, 1.f);
  else
    run(argv[1], x, y);
  if (const cudaError_t e = cudaGetLastError(); e != cudaSuccess) {
    std::puts(cudaGetErrorString(e));
    return 1;
  }
  cudaMemcpy(result, y, sizeof result, cudaMemcpyDeviceToHost);
  for (int t = 0; t < 64 && !words; ++t) {
    float want = 0;
    for (int tile = 0; tile < kTiles; ++tile)
      for (int i = 0; i < 4; ++i) want += (i + 1) * host[tile * kTile + kTile - 1 - (64 * i + t)];
    if (result[t] != want) return 2;
  }
  return 0;
}
