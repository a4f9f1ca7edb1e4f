// The simulator's encoding of CUtensorMap (opaque to programs).
#pragma once
#include <cuda.h>

#include <cstdint>

namespace ptxsim {

enum class Swizzle : uint8_t { none, b32, b64, b128 };

struct TensorMap {
  static constexpr uint32_t kMagic = 0x70747854;
  uint32_t magic;
  uint8_t type;  ///< CUtensorMapDataType
  uint8_t element_bytes;
  uint8_t rank;
  uint8_t interleave;
  Swizzle swizzle;
  uint8_t fill_nan;  ///< out-of-bounds elements read as NaN, not zero
  uint8_t element_stride[5];
  uint64_t base;
  uint32_t size[5];    ///< elements
  uint64_t stride[4];  ///< bytes, of dimensions 1..4
  uint16_t box[5];     ///< elements

  static const TensorMap* from(const void* p);  ///< null if it is no tensor map
};
static_assert(sizeof(TensorMap) <= 128);

CUresult encode_tensor_map_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                 const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                 const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                                 CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill);

}  // namespace ptxsim
