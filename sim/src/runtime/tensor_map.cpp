#include "runtime/tensor_map.h"

#include <cstdio>
#include <cstring>

namespace ptxsim {
namespace {

unsigned element_bytes(CUtensorMapDataType t) {
  switch (t) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 0;
  }
}

CUresult refuse(const char* why) {
  std::fprintf(stderr, "ptxsim: cuTensorMapEncodeTiled: %s\n", why);
  return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

const TensorMap* TensorMap::from(const void* p) {
  const auto* m = static_cast<const TensorMap*>(p);
  return m->magic == kMagic ? m : nullptr;
}

/// The restrictions are those the driver documents.
CUresult encode_tensor_map_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                 const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                 const cuuint32_t* element_stride, CUtensorMapInterleave interleave,
                                 CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  TensorMap m = {};
  m.magic = TensorMap::kMagic;
  m.type = static_cast<uint8_t>(type);
  const unsigned bytes = element_bytes(type);
  if (!bytes) return refuse("element type is not supported");
  if (rank < 1 || rank > 5) return refuse("rank must be 1 to 5");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refuse("interleaved layouts are not supported");
  if (reinterpret_cast<uint64_t>(address) % 16) return refuse("the global address must be a multiple of 16");
  m.element_bytes = static_cast<uint8_t>(bytes);
  m.rank = static_cast<uint8_t>(rank);
  m.base = reinterpret_cast<uint64_t>(address);
  m.fill_nan = fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      m.swizzle = Swizzle::none;
      break;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      m.swizzle = Swizzle::b32;
      break;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      m.swizzle = Swizzle::b64;
      break;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      m.swizzle = Swizzle::b128;
      break;
    default:
      return refuse("swizzle mode is not supported");
  }
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (size[i] == 0 || size[i] > (1ull << 32)) return refuse("dimension size out of range");
    if (box[i] == 0 || box[i] > 256) return refuse("box dimension must be 1 to 256");
    if (element_stride[i] == 0 || element_stride[i] > 8) return refuse("element stride must be 1 to 8");
    m.size[i] = static_cast<uint32_t>(size[i]);
    m.box[i] = static_cast<uint16_t>(box[i]);
    m.element_stride[i] = static_cast<uint8_t>(element_stride[i]);
    if (i + 1 < rank) {
      if (stride[i] % 16 || stride[i] >= (1ull << 40)) return refuse("strides must be multiples of 16 below 2^40");
      m.stride[i] = stride[i];
    }
  }
  const unsigned inner = box[0] * bytes;
  if (inner % 16) return refuse("the inner box dimension must be a multiple of 16 bytes");
  const unsigned span = m.swizzle == Swizzle::b32    ? 32
                        : m.swizzle == Swizzle::b64  ? 64
                        : m.swizzle == Swizzle::b128 ? 128
                                                     : ~0u;
  if (inner > span) return refuse("the inner box dimension exceeds the swizzle span");
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &m, sizeof m);
  return CUDA_SUCCESS;
}

}  // namespace ptxsim
