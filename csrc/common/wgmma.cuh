// Warpgroup products of sm_90a: 64 rows by kN columns by 16, both operands tiles in shared memory
// whose lines are 128 bytes of k, swizzled as bulk copies leave them (bulk_copy.cuh).
#pragma once

#include "common/convert.cuh"

namespace eet_patch::cuda {

// The instructions belong to sm_90a alone: neither plain sm_90 nor later chips have them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define EET_HAS_WARPGROUP_PRODUCTS 1
#else
#define EET_HAS_WARPGROUP_PRODUCTS 0
#endif

// A tile at a shared memory address that is a multiple of kBoxAlignment. Groups of 8 lines lie 1024
// bytes apart; a step of 16 along k moves the address by 32 bytes.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kGroupStride = uint64_t(1024 >> 4) << 32;
  constexpr uint64_t kLineStride = uint64_t(1) << 16;  // not looked at for swizzled tiles
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | kGroupStride | kLineStride | uint64_t((address & 0x3ffff) >> 4);
}
constexpr int kDescriptorStep = 32 >> 4;        // from one 16 of k to the next
constexpr int kDescriptorHalf = 64 * 128 >> 4;  // from 64 lines to the next 64

// Before the first product that reads what the registers or another proxy have written.
__device__ __forceinline__ void warpgroup_fence() {
#if EET_HAS_WARPGROUP_PRODUCTS
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void warpgroup_commit() {
#if EET_HAS_WARPGROUP_PRODUCTS
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until all but the last kGroups committed groups are done.
template <int kGroups>
__device__ __forceinline__ void warpgroup_wait() {
#if EET_HAS_WARPGROUP_PRODUCTS
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}
// Keeps the compiler from moving uses of accumulators over a wait.
template <int kCount>
__device__ __forceinline__ void keep_in_place(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if EET_HAS_WARPGROUP_PRODUCTS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#if EET_HAS_WARPGROUP_PRODUCTS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// sums (64, kN) (+)= a (64, 16) @ b (kN, 16)^T, queued: a whole warpgroup calls it, between a fence
// and a commit. Lane l = 4 g + q of warp w holds of every 8 columns j
//   sums[4 j .. 4 j + 1]: row 16 w + g, columns 8 j + 2 q and the next; [4 j + 2 .. 4 j + 3]: row
//   16 w + g + 8.
template <typename T, int kN>
struct WarpgroupProduct;

#define EET_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define EET_REGISTERS_32 \
  EET_REGISTERS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EET_REGISTERS_48 \
  EET_REGISTERS_32       \
  ", "                   \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define EET_REGISTERS_56 \
  EET_REGISTERS_48       \
  ", "                   \
  "%48, %49, %50, %51, %52, %53, %54, %55"
#define EET_REGISTERS_64 \
  EET_REGISTERS_56       \
  ", "                   \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define EET_REGISTERS_80 \
  EET_REGISTERS_64       \
  ", "                   \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define EET_REGISTERS_96 \
  EET_REGISTERS_80       \
  ", "                   \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define EET_REGISTERS_104 \
  EET_REGISTERS_96        \
  ", "                    \
  "%96, %97, %98, %99, %100, %101, %102, %103"
#define EET_REGISTERS_128                                                                      \
  EET_REGISTERS_104                                                                            \
  ", "                                                                                         \
  "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127"
#define EET_SUMS_8(i)                                                                            \
  "+f"(sums[i + 0]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define EET_SUMS_16 EET_SUMS_8(0), EET_SUMS_8(8)
#define EET_SUMS_32 EET_SUMS_16, EET_SUMS_8(16), EET_SUMS_8(24)
#define EET_SUMS_48 EET_SUMS_32, EET_SUMS_8(32), EET_SUMS_8(40)
#define EET_SUMS_56 EET_SUMS_48, EET_SUMS_8(48)
#define EET_SUMS_64 EET_SUMS_56, EET_SUMS_8(56)
#define EET_SUMS_80 EET_SUMS_64, EET_SUMS_8(64), EET_SUMS_8(72)
#define EET_SUMS_96 EET_SUMS_80, EET_SUMS_8(80), EET_SUMS_8(88)
#define EET_SUMS_104 EET_SUMS_96, EET_SUMS_8(96)
#define EET_SUMS_128 EET_SUMS_104, EET_SUMS_8(104), EET_SUMS_8(112), EET_SUMS_8(120)

#if EET_HAS_WARPGROUP_PRODUCTS
#define EET_PRODUCT(type, columns, count, a_index, b_index, p_index)                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_index                                   \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type           \
               " {" EET_REGISTERS_##count "}, %" #a_index ", %" #b_index ", p, 1, 1, 0, 0;\n}" \
               : EET_SUMS_##count                                                              \
               : "l"(a), "l"(b), "r"(accumulate))
#else
#define EET_PRODUCT(type, columns, count, a_index, b_index, p_index) \
  (void)sums, (void)a, (void)b, (void)accumulate
#endif

#define EET_DEFINE_PRODUCT(columns, count, a_index, b_index, p_index)                        \
  template <>                                                                                \
  struct WarpgroupProduct<__half, columns> {                                                 \
    static __device__ __forceinline__ void add(float (&sums)[count], uint64_t a, uint64_t b, \
                                               int accumulate) {                             \
      EET_PRODUCT("f16", columns, count, a_index, b_index, p_index);                         \
    }                                                                                        \
  };                                                                                         \
  template <>                                                                                \
  struct WarpgroupProduct<__nv_bfloat16, columns> {                                          \
    static __device__ __forceinline__ void add(float (&sums)[count], uint64_t a, uint64_t b, \
                                               int accumulate) {                             \
      EET_PRODUCT("bf16", columns, count, a_index, b_index, p_index);                        \
    }                                                                                        \
  };

EET_DEFINE_PRODUCT(32, 16, 16, 17, 18)
EET_DEFINE_PRODUCT(64, 32, 32, 33, 34)
EET_DEFINE_PRODUCT(96, 48, 48, 49, 50)
EET_DEFINE_PRODUCT(112, 56, 56, 57, 58)
EET_DEFINE_PRODUCT(128, 64, 64, 65, 66)
EET_DEFINE_PRODUCT(160, 80, 80, 81, 82)
EET_DEFINE_PRODUCT(192, 96, 96, 97, 98)
EET_DEFINE_PRODUCT(208, 104, 104, 105, 106)
EET_DEFINE_PRODUCT(256, 128, 128, 129, 130)

#undef EET_DEFINE_PRODUCT
#undef EET_PRODUCT
#undef EET_SUMS_8
#undef EET_SUMS_16
#undef EET_SUMS_32
#undef EET_SUMS_48
#undef EET_SUMS_56
#undef EET_SUMS_64
#undef EET_SUMS_80
#undef EET_SUMS_96
#undef EET_SUMS_104
#undef EET_SUMS_128
#undef EET_REGISTERS_16
#undef EET_REGISTERS_32
#undef EET_REGISTERS_48
#undef EET_REGISTERS_56
#undef EET_REGISTERS_64
#undef EET_REGISTERS_80
#undef EET_REGISTERS_96
#undef EET_REGISTERS_104
#undef EET_REGISTERS_128

}  // namespace eet_patch::cuda
