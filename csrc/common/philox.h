// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011):
// four words that depend on a counter and a key alone, so the CPU and a GPU draw the same bits in any order.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define REMORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define REMORA_HOST_DEVICE inline
#endif

namespace remora {

struct PhiloxWords {
  uint32_t word[4];
};

REMORA_HOST_DEVICE PhiloxWords philox(PhiloxWords counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  PhiloxWords x = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * x.word[0], b = uint64_t{0xCD9E8D57u} * x.word[2];
    x = {{static_cast<uint32_t>(b >> 32) ^ x.word[1] ^ key0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ x.word[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return x;
}

/// Rounds a float to bfloat16, up with the probability that its discarded bits are, of 16 random bits. NaN stays NaN
/// and infinity infinity.
REMORA_HOST_DEVICE uint16_t round_bfloat16_stochastically(uint32_t float_bits, uint32_t random) {
  const bool is_finite = (float_bits & 0x7f800000u) != 0x7f800000u;
  const bool is_nan = !is_finite && (float_bits & 0x007fffffu) != 0;
  const uint32_t rounded = float_bits + (is_finite ? random & 0xffffu : 0u);
  return static_cast<uint16_t>((rounded >> 16) | (is_nan ? 0x40u : 0u));
}

}  // namespace remora
