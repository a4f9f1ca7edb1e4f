// Scratch memory of one thread, laid out by the code that uses it.
#pragma once
#include <cstdint>

namespace remora {

/// Hands out 64-byte aligned pieces of a buffer one after the other; on a null buffer it only counts.
class Arena {
 public:
  explicit Arena(void* buffer) : buffer_(static_cast<char*>(buffer)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = buffer_ ? reinterpret_cast<T*>(buffer_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }

  int64_t used() const { return used_; }

 private:
  char* buffer_;
  int64_t used_ = 0;
};

}  // namespace remora
