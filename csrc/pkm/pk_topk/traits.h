// Tiles and thread roles of the CUDA selection kernel.
#pragma once

namespace remora {

constexpr int kPkTopkWarps = 8;
constexpr int kPkTopkThreads = 32 * kPkTopkWarps;
constexpr int kPkTopkTokens = 32;    // most tokens of a CTA, one tile of query halves
constexpr int kPkTopkKeys = 128;     // of a tile of sub-keys, 16 a warp
constexpr int kPkTopkRowSize = 128;  // bytes of a tile's row: 64 elements of 16 bits, 32 floats
constexpr int kPkTopkStages = 2;
constexpr int kPkTopkStageSize = (kPkTopkTokens + kPkTopkKeys) * kPkTopkRowSize;

}  // namespace remora
