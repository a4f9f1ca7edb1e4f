// Swizzled tiles in shared memory and the loads of matrix fragments from them, free of bank conflicts.
//
// SmemTile<T, COLS>   rows of COLS elements (64 bytes or a multiple of 128); the 16-byte units of a row are permuted by
//                     XOR.
// SmemBlock<T>        16x16 elements, rows of 32 or 64 bytes permuted within and across 128-byte lines.
// Both offer, for a tile at shared address `base`:
//   load_a        A[m, k] from memory [m][k]
//   load_a_trans  the same from memory [k][m]
//   load_b        B[k, n], n in two halves of 8, from memory [n][k]
//   load_b_trans  the same from memory [k][n]
//   (SmemBlock also moves C fragments, straight and transposed.)
#pragma once
#include "common/mma.cuh"

namespace remora {

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ float load_shared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint32_t load_shared_bits(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ float2 load_shared_2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ float4 load_shared_4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, __nv_bfloat16 x) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(__bfloat16_as_ushort(x)) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, __half x) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(__half_as_ushort(x)) : "memory");
}

/// How ldmatrix.x4 finds its four 8x8 matrices: lane l names row `row` of the one with 16-byte unit `unit`.
struct MatrixLane {
  int row, unit;
};
__device__ __forceinline__ MatrixLane lane_of_a() {
  const int lane_idx = threadIdx.x % 32;
  return {lane_idx % 16, lane_idx / 16};
}
__device__ __forceinline__ MatrixLane lane_of_b() {
  const int lane_idx = threadIdx.x % 32;
  return {lane_idx % 8 + lane_idx / 16 * 8, lane_idx / 8 % 2};
}

template <typename T, int COLS>
struct SmemTile {
  static constexpr int ROW_SIZE = COLS * sizeof(T);
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static_assert(ROW_SIZE % 128 == 0 || (ROW_SIZE == 64 && !kIsFloat));

  static constexpr int size(int rows) { return rows * ROW_SIZE; }

  /// Bits 4..6 of the byte offset are XORed with this. float: four neighbouring rows and four rows two apart must each
  /// cover the banks with 32 bytes a row; 16-bit: eight neighbouring rows with 16 bytes a row.
  __device__ static __forceinline__ int swizzle(int row) {
    if constexpr (ROW_SIZE == 64) return (row >> 1 & 3) << 4;  // two rows share a line of the banks
    return kIsFloat ? ((row & 3) ^ (row >> 2 & 1)) << 5 : (row & 7) << 4;
  }
  /// Byte offset of an element.
  __device__ static __forceinline__ int offset(int row, int col) {
    return row * ROW_SIZE + ((col * static_cast<int>(sizeof(T))) ^ swizzle(row));
  }

  /// row0 and col0 are multiples of 16, known at compile time in unrolled loops: only the XOR is left at run time. (Of
  /// 8 for pairs.)
  __device__ static __forceinline__ uint32_t place(uint32_t base, int lane_offset, int row0, int col0) {
    const int col_offset = col0 * static_cast<int>(sizeof(T));
    return base + (lane_offset ^ (col_offset & 127)) + row0 * ROW_SIZE + (col_offset & ~127);
  }

  __device__ static __forceinline__ FragA<T> load_a(uint32_t base, int row0, int col0) {
    FragA<T> a;
    if constexpr (kIsFloat) {
      const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float2 x = load_shared_2(place(base, offset(row, col), row0 + pair % 2 * 8, col0) ^ (pair / 2 * 32));
        a.r[2 * pair] = x.x;
        a.r[2 * pair + 1] = x.y;
      }
    } else {
      const MatrixLane lane = lane_of_a();
      ldmatrix(a.r, place(base, offset(lane.row, lane.unit * 8), row0, col0));
    }
    return a;
  }

  __device__ static __forceinline__ FragA<T> load_a_trans(uint32_t base, int k0, int m0) {
    FragA<T> a;
    if constexpr (kIsFloat) {
      const int k = threadIdx.x % 4 * 2, m = threadIdx.x % 32 / 4;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a.r[i] = load_shared(place(base, offset(k + i % 2, m), k0 + i / 4 * 8, m0) ^ (i / 2 % 2 * 32));
      }
    } else {
      const MatrixLane lane = lane_of_b();
      ldmatrix_trans(a.r, place(base, offset(lane.row, lane.unit * 8), k0, m0));
    }
    return a;
  }

  __device__ static __forceinline__ void load_b(FragB<T> (&b)[2], uint32_t base, int n0, int k0) {
    if constexpr (kIsFloat) {
      const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const float2 x = load_shared_2(place(base, offset(row, col), n0 + half * 8, k0) ^ (step * 32));
          b[half].r[2 * step] = x.x;
          b[half].r[2 * step + 1] = x.y;
        }
      }
    } else {
      const MatrixLane lane = lane_of_b();
      uint32_t r[4];
      ldmatrix(r, place(base, offset(lane.row, lane.unit * 8), n0, k0));
      b[0] = {{r[0], r[1]}};
      b[1] = {{r[2], r[3]}};
    }
  }

  __device__ static __forceinline__ void load_b_trans(FragB<T> (&b)[2], uint32_t base, int k0, int n0) {
    if constexpr (kIsFloat) {
      const int k = threadIdx.x % 4 * 2, n = threadIdx.x % 32 / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int lane_offset = offset(k + i % 2, n);
          b[half].r[i] = load_shared(place(base, lane_offset, k0 + i / 2 * 8, n0) ^ (half * 32));
        }
      }
    } else {
      const MatrixLane lane = lane_of_a();
      uint32_t r[4];
      ldmatrix_trans(r, place(base, offset(lane.row, lane.unit * 8), k0, n0));
      b[0] = {{r[0], r[1]}};
      b[1] = {{r[2], r[3]}};
    }
  }

  /// Elements (row, col) and (row, col + 1), col even: a row of a C fragment; or those at an address, as from `place`.
  __device__ static __forceinline__ float2 load_pair(uint32_t address) {
    if constexpr (kIsFloat) {
      return load_shared_2(address);
    } else {
      return unpack<T>(load_shared_bits(address));
    }
  }
  __device__ static __forceinline__ void store_pair(uint32_t address, float x, float y) {
    if constexpr (kIsFloat) {
      store_shared(address, make_float2(x, y));
    } else {
      store_shared(address, pack<T>(x, y));
    }
  }
  __device__ static __forceinline__ float2 load_pair(uint32_t base, int row, int col) {
    return load_pair(base + offset(row, col));
  }
  __device__ static __forceinline__ void store_pair(uint32_t base, int row, int col, float x, float y) {
    store_pair(base + offset(row, col), x, y);
  }
};

template <typename T>
struct SmemBlock {
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr int SIZE = 256 * sizeof(T);

  /// Byte offset of an element. 16-bit: four rows a line, units of 16 bytes; float: two rows a line, units of 32.
  __device__ static __forceinline__ int offset(int row, int col) {
    if constexpr (kIsFloat) {
      const int line = row / 2;
      return line * 128 + ((row % 2 * 2 + col / 8) ^ (line & 3)) * 32 + col % 8 * 4;
    } else {
      const int line = row / 4;
      return line * 128 + ((row % 4 * 2 + col / 8) ^ (line & 1)) * 16 + col % 8 * 2;
    }
  }

  __device__ static __forceinline__ FragA<T> load_a(uint32_t base) {
    FragA<T> a;
    if constexpr (kIsFloat) {
      const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float2 x = load_shared_2(base + offset(row + pair % 2 * 8, col + pair / 2 * 8));
        a.r[2 * pair] = x.x;
        a.r[2 * pair + 1] = x.y;
      }
    } else {
      const MatrixLane lane = lane_of_a();
      ldmatrix(a.r, base + offset(lane.row, lane.unit * 8));
    }
    return a;
  }

  __device__ static __forceinline__ FragA<T> load_a_trans(uint32_t base) {
    FragA<T> a;
    if constexpr (kIsFloat) {
      const int k = threadIdx.x % 4 * 2, m = threadIdx.x % 32 / 4;
#pragma unroll
      for (int i = 0; i < 8; ++i) a.r[i] = load_shared(base + offset(k + i % 2 + i / 4 * 8, m + i / 2 % 2 * 8));
    } else {
      const MatrixLane lane = lane_of_b();
      ldmatrix_trans(a.r, base + offset(lane.row, lane.unit * 8));
    }
    return a;
  }

  __device__ static __forceinline__ void load_b(FragB<T> (&b)[2], uint32_t base) {
    if constexpr (kIsFloat) {
      const int n = threadIdx.x % 32 / 4, k = threadIdx.x % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const float2 x = load_shared_2(base + offset(n + half * 8, k + step * 8));
          b[half].r[2 * step] = x.x;
          b[half].r[2 * step + 1] = x.y;
        }
      }
    } else {
      const MatrixLane lane = lane_of_b();
      uint32_t r[4];
      ldmatrix(r, base + offset(lane.row, lane.unit * 8));
      b[0] = {{r[0], r[1]}};
      b[1] = {{r[2], r[3]}};
    }
  }

  __device__ static __forceinline__ void load_b_trans(FragB<T> (&b)[2], uint32_t base) {
    if constexpr (kIsFloat) {
      const int k = threadIdx.x % 4 * 2, n = threadIdx.x % 32 / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          b[half].r[i] = load_shared(base + offset(k + i % 2 + i / 2 * 8, n + half * 8));
        }
      }
    } else {
      const MatrixLane lane = lane_of_a();
      uint32_t r[4];
      ldmatrix_trans(r, base + offset(lane.row, lane.unit * 8));
      b[0] = {{r[0], r[1]}};
      b[1] = {{r[2], r[3]}};
    }
  }

  __device__ static __forceinline__ void load_c_trans(FragC (&c)[2], uint32_t base) {
    static_assert(kIsFloat);
    const int n = threadIdx.x % 4 * 2, m = threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        c[half].r[i] = load_shared(base + offset(half * 8 + n + i % 2, m + i / 2 * 8));
      }
    }
  }

  /// Writes C[m, n] (n in two halves) to memory [m][n].
  __device__ static __forceinline__ void store_c(uint32_t base, const FragC (&c)[2]) {
    const int m = threadIdx.x % 32 / 4, n = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t address = base + offset(m + i * 8, half * 8 + n);
        if constexpr (kIsFloat) {
          store_shared(address, make_float2(c[half].r[2 * i], c[half].r[2 * i + 1]));
        } else {
          store_shared(address, pack<T>(c[half].r[2 * i], c[half].r[2 * i + 1]));
        }
      }
    }
  }

  /// Writes C[m, n] (n in two halves) to memory [n][m].
  __device__ static __forceinline__ void store_c_trans(uint32_t base, const FragC (&c)[2]) {
    const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (kIsFloat) {
          store_shared(base + offset(half * 8 + col, row + i * 8), c[half].r[2 * i]);
          store_shared(base + offset(half * 8 + col + 1, row + i * 8), c[half].r[2 * i + 1]);
        } else {
          const uint32_t x = transpose_8x8(pack<T>(c[half].r[2 * i], c[half].r[2 * i + 1]));
          store_shared(base + offset(half * 8 + row, i * 8 + col), x);
        }
      }
    }
  }
};

}  // namespace remora
