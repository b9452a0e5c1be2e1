// Warpgroup products of sm_90a whose first operand lies in registers, and descriptors of tiles with
// lines of 64 or 128 bytes (wgmma.cuh has those of two operands in shared memory).
#pragma once

#include "common/wgmma.cuh"

namespace eet_patch::cuda {

// A tile at a shared memory address that is a multiple of 8 lines, as a bulk copy with a swizzle of
// kLineBytes leaves it. Serves both ways of reading it: lines of k, where a step of 16 along k
// moves the address by 32 bytes, and lines of columns (a transposed operand, no wider than a line),
// where it moves by 16 lines.
template <int kLineBytes>
__device__ __forceinline__ uint64_t line_descriptor(uint32_t address) {
  static_assert(kLineBytes == 64 || kLineBytes == 128);
  constexpr uint64_t kGroupStride = uint64_t(8 * kLineBytes >> 4)
                                    << 32;             // from 8 lines to the next
  constexpr uint64_t kLineStride = uint64_t(1) << 16;  // not looked at for swizzled tiles
  constexpr uint64_t kSwizzle = uint64_t(kLineBytes == 128 ? 1 : 2) << 62;
  return kSwizzle | kGroupStride | kLineStride | uint64_t((address & 0x3ffff) >> 4);
}

// sums (64, kN) += a (64, 16) @ b (16, kN), queued like WarpgroupProduct, the sums laid out as
// there. a[0 .. 3] of lane 4 g + q of warp w, two neighbours each: row 16 w + g, columns 2 q and
// the next; row 16 w + g + 8; then both again 8 columns on. b: a tile of 16 lines of kN columns.
template <typename T, int kN>
struct WarpgroupRegisterProduct;

// Scores become the next product's `a` without a shuffle: 16 of their columns are 8 sums a lane.
template <typename T>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float* sums) {
  a[0] = pack2<T>(sums[0], sums[1]);
  a[1] = pack2<T>(sums[2], sums[3]);
  a[2] = pack2<T>(sums[4], sums[5]);
  a[3] = pack2<T>(sums[6], sums[7]);
}

#define EET_SUMS_8(i)                                                                            \
  "+f"(sums[i + 0]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define EET_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define EET_REGISTERS_32 \
  EET_REGISTERS_16       \
  ", "                   \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EET_SUMS_16 EET_SUMS_8(0), EET_SUMS_8(8)
#define EET_SUMS_32 EET_SUMS_16, EET_SUMS_8(16), EET_SUMS_8(24)

#if EET_HAS_WARPGROUP_PRODUCTS
#define EET_PRODUCT(type, columns, count, a0, a1, a2, a3, b_index)                         \
  asm volatile(                                                                            \
      "{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                \
      " {" EET_REGISTERS_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_index \
                                 ", p, 1, 1, 1;\n}"                                        \
      : EET_SUMS_##count                                                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#else
#define EET_PRODUCT(type, columns, count, a0, a1, a2, a3, b_index) (void)sums, (void)a, (void)b
#endif

#define EET_DEFINE_PRODUCT(columns, count, a0, a1, a2, a3, b_index)                          \
  template <>                                                                                \
  struct WarpgroupRegisterProduct<__half, columns> {                                         \
    static __device__ __forceinline__ void add(float (&sums)[count], const uint32_t (&a)[4], \
                                               uint64_t b) {                                 \
      EET_PRODUCT("f16", columns, count, a0, a1, a2, a3, b_index);                           \
    }                                                                                        \
  };                                                                                         \
  template <>                                                                                \
  struct WarpgroupRegisterProduct<__nv_bfloat16, columns> {                                  \
    static __device__ __forceinline__ void add(float (&sums)[count], const uint32_t (&a)[4], \
                                               uint64_t b) {                                 \
      EET_PRODUCT("bf16", columns, count, a0, a1, a2, a3, b_index);                          \
    }                                                                                        \
  };

EET_DEFINE_PRODUCT(32, 16, 16, 17, 18, 19, 20)
EET_DEFINE_PRODUCT(64, 32, 32, 33, 34, 35, 36)

#undef EET_DEFINE_PRODUCT
#undef EET_PRODUCT
#undef EET_SUMS_8
#undef EET_SUMS_16
#undef EET_SUMS_32
#undef EET_REGISTERS_16
#undef EET_REGISTERS_32

}  // namespace eet_patch::cuda
