#include "ops/tensor_tile.h"

#include <algorithm>
#include <mutex>

#include "ops/float_lanes.h"
#include "ptxsim/error.h"

namespace ptxsim {
namespace {

// Reductions of different CTAs into one tensor must not interleave.
std::mutex reduction_mutex;

template <class T>
T integer(BulkReduction op, T a, T b) {
  switch (op) {
    case BulkReduction::add:
      return static_cast<T>(a + b);
    case BulkReduction::min:
      return std::min(a, b);
    case BulkReduction::max:
      return std::max(a, b);
    case BulkReduction::inc:
      return a >= b ? T{0} : static_cast<T>(a + 1);
    case BulkReduction::dec:
      return a == 0 || a > b ? b : static_cast<T>(a - 1);
    case BulkReduction::and_:
      return a & b;
    case BulkReduction::or_:
      return a | b;
    case BulkReduction::xor_:
      return a ^ b;
    default:
      return b;
  }
}
template <class T>
T real(BulkReduction op, T a, T b) {
  return op == BulkReduction::add ? a + b : op == BulkReduction::min ? min_number(a, b) : max_number(a, b);
}
template <class T, class F>
void apply(uint8_t* to, const uint8_t* from, F f) {
  T a, b;
  std::memcpy(&a, to, sizeof(T));
  std::memcpy(&b, from, sizeof(T));
  a = f(a, b);
  std::memcpy(to, &a, sizeof(T));
}

Type element_type(const TensorMap& m) {
  switch (static_cast<CUtensorMapDataType>(m.type)) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return Type::u8;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
      return Type::u16;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
      return Type::u32;
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
      return Type::s32;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
      return Type::u64;
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
      return Type::s64;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
      return Type::f16;
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return Type::bf16;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return Type::f64;
    default:
      return Type::f32;
  }
}

/// Calls f(global pointer or null, shared byte address) for each element of the box.
template <class F>
void for_elements(const TensorMap& m, const int32_t* c, uint32_t offset, F&& f) {
  uint32_t i[5] = {};
  const uint32_t box[5] = {m.box[0], m.rank > 1 ? m.box[1] : 1u, m.rank > 2 ? m.box[2] : 1u, m.rank > 3 ? m.box[3] : 1u,
                           m.rank > 4 ? m.box[4] : 1u};
  uint32_t linear = 0;
  for (i[4] = 0; i[4] < box[4]; ++i[4])
    for (i[3] = 0; i[3] < box[3]; ++i[3])
      for (i[2] = 0; i[2] < box[2]; ++i[2])
        for (i[1] = 0; i[1] < box[1]; ++i[1]) {
          bool row_inside = true;
          uint64_t row = m.base;
          for (unsigned d = 1; d < m.rank; ++d) {
            const int64_t x = int64_t{c[d]} + int64_t{i[d]} * m.element_stride[d];
            row_inside &= x >= 0 && x < static_cast<int64_t>(m.size[d]);
            row += static_cast<uint64_t>(x) * m.stride[d - 1];
          }
          for (i[0] = 0; i[0] < box[0]; ++i[0], ++linear) {
            const int64_t x = int64_t{c[0]} + int64_t{i[0]} * m.element_stride[0];
            const bool inside = row_inside && x >= 0 && x < static_cast<int64_t>(m.size[0]);
            f(inside ? reinterpret_cast<uint8_t*>(row + static_cast<uint64_t>(x) * m.element_bytes) : nullptr,
              swizzle_address(offset + linear * m.element_bytes, m.swizzle));
          }
        }
}

uint64_t fill_bits(const TensorMap& m) {
  if (!m.fill_nan) return 0;
  const Type t = element_type(m);
  return t == Type::f64 ? 0x7ff8000000000000ull : t == Type::f32 ? 0x7fffffffu : 0x7fffu;
}

}  // namespace

void reduce_element(uint8_t* to, const uint8_t* from, Type t, BulkReduction op) {
  const auto i = [op](auto a, auto b) { return integer(op, a, b); };
  const auto r = [op](auto a, auto b) { return real(op, a, b); };
  switch (t) {
    case Type::u32:
    case Type::b32:
      return apply<uint32_t>(to, from, i);
    case Type::s32:
      return apply<int32_t>(to, from, i);
    case Type::u64:
    case Type::b64:
      return apply<uint64_t>(to, from, i);
    case Type::s64:
      return apply<int64_t>(to, from, i);
    case Type::f32:
      return apply<float>(to, from, r);
    case Type::f64:
      return apply<double>(to, from, r);
    case Type::f16:
      return apply<half>(to, from, [op](half a, half b) { return to_half(real(op, to_float(a), to_float(b))); });
    case Type::bf16:
      return apply<bfloat>(to, from,
                           [op](bfloat a, bfloat b) { return to_bfloat(real(op, to_float(a), to_float(b))); });
    default:
      fail("bulk reduction of this element type is not supported");
  }
}

uint32_t tile_bytes(const TensorMap& m) {
  uint32_t n = m.element_bytes;
  for (unsigned d = 0; d < m.rank; ++d) n *= m.box[d];
  return n;
}

void for_tile_rows(const TensorMap& m, const int32_t* c, const std::function<void(uint64_t, uint64_t)>& f) {
  uint64_t begin = 0, bytes = 0;
  for_elements(m, c, 0, [&](const uint8_t* global, uint32_t) {
    const auto a = reinterpret_cast<uint64_t>(global);
    if (global && bytes && a == begin + bytes) {
      bytes += m.element_bytes;
      return;
    }
    if (bytes) f(begin, bytes);
    begin = a;
    bytes = global ? m.element_bytes : 0;
  });
  if (bytes) f(begin, bytes);
}

void load_tile(const TensorMap& m, const int32_t* c, uint8_t* shared, uint32_t offset) {
  const uint64_t fill = fill_bits(m);
  for_elements(m, c, offset, [&](const uint8_t* global, uint32_t at) {
    std::memcpy(shared + at, global ? static_cast<const void*>(global) : &fill, m.element_bytes);
  });
}

void store_tile(const TensorMap& m, const int32_t* c, const uint8_t* shared, uint32_t offset, BulkReduction op) {
  std::unique_lock<std::mutex> lock(reduction_mutex, std::defer_lock);
  if (op != BulkReduction::none) lock.lock();
  const Type t = element_type(m);
  for_elements(m, c, offset, [&](uint8_t* global, uint32_t at) {
    if (!global) return;
    if (op == BulkReduction::none)
      std::memcpy(global, shared + at, m.element_bytes);
    else
      reduce_element(global, shared + at, t, op);
  });
}

}  // namespace ptxsim
