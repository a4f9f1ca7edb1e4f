// PTX scalar types and state spaces.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

namespace ptxsim {

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  b128,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  bf16,
  f32,
  f64,
  tf32,
  f16x2,
  bf16x2,
  u16x2,
  s16x2,
  e4m3,
  e5m2,
  e4m3x2,
  e5m2x2,
};

enum class Space : uint8_t { generic, global, constant, shared, local, param };

/// Size in bytes of one element (a predicate is held as a 4-byte lane mask).
constexpr unsigned size_of(Type t) {
  switch (t) {
    case Type::b8:
    case Type::u8:
    case Type::s8:
    case Type::e4m3:
    case Type::e5m2:
      return 1;
    case Type::b16:
    case Type::u16:
    case Type::s16:
    case Type::f16:
    case Type::bf16:
    case Type::e4m3x2:
    case Type::e5m2x2:
      return 2;
    case Type::b64:
    case Type::u64:
    case Type::s64:
    case Type::f64:
      return 8;
    case Type::b128:
      return 16;
    case Type::none:
      return 0;
    default:
      return 4;
  }
}

constexpr bool is_signed_int(Type t) { return t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64; }
constexpr bool is_unsigned_int(Type t) { return t == Type::u8 || t == Type::u16 || t == Type::u32 || t == Type::u64; }
constexpr bool is_int(Type t) { return is_signed_int(t) || is_unsigned_int(t); }
constexpr bool is_bits(Type t) {
  return t == Type::b8 || t == Type::b16 || t == Type::b32 || t == Type::b64 || t == Type::b128;
}
constexpr bool is_float(Type t) {
  return t == Type::f16 || t == Type::bf16 || t == Type::f32 || t == Type::f64 || t == Type::tf32;
}

std::optional<Type> parse_type(std::string_view name);
const char* type_name(Type t);
const char* space_name(Space s);

}  // namespace ptxsim
