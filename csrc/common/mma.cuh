// Tensor core products, shared memory fragment loads and asynchronous copies, with what older chips
// need instead.
#pragma once

#include "common/cluster.cuh"
#include "common/convert.cuh"
#include "common/reduce.cuh"

namespace eet_patch::cuda {

// c += a (16 x 16, row) * b (16 x 8, column), accumulated in float. Lane l = 4 g + q holds
//   a0, a2: row g, columns 2q..2q+1 and 2q+8..2q+9;  a1, a3: the same of row g + 8;
//   b0, b1: column g, rows 2q..2q+1 and 2q+8..2q+9;  c[0..1]: row g, columns 2q..2q+1;  c[2..3]:
//   row g + 8.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], uint32_t a0, uint32_t a1,
                                                     uint32_t a2, uint32_t a3, uint32_t b0,
                                                     uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a2), "r"(a3), "r"(b1));
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
// sm_75 multiplies no bfloat16: gather the operands by shuffles and use plain FMA. Right, and slow;
// a call, not inlined, because hundreds of copies of it in a kernel take minutes to compile.
__device__ __noinline__ static float4 multiply_bfloat16(float4 c, uint32_t a0, uint32_t a1,
                                                        uint32_t a2, uint32_t a3, uint32_t b0,
                                                        uint32_t b1) {
  const int lane = threadIdx.x % kWarpSize, row_lane = lane & ~3, column_lane = (lane & 3) * 8;
  float sums[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const uint32_t a[4] = {
        __shfl_sync(kFullMask, a0, row_lane + q), __shfl_sync(kFullMask, a1, row_lane + q),
        __shfl_sync(kFullMask, a2, row_lane + q), __shfl_sync(kFullMask, a3, row_lane + q)};
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const float2 low =
          unpack2<__nv_bfloat16>(__shfl_sync(kFullMask, b0, column_lane + 4 * column + q));
      const float2 high =
          unpack2<__nv_bfloat16>(__shfl_sync(kFullMask, b1, column_lane + 4 * column + q));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 first = unpack2<__nv_bfloat16>(a[half]),
                     second = unpack2<__nv_bfloat16>(a[2 + half]);
        float& sum = sums[2 * half + column];
        sum = fmaf(first.x, low.x,
                   fmaf(first.y, low.y, fmaf(second.x, high.x, fmaf(second.y, high.y, sum))));
      }
    }
  }
  return make_float4(sums[0], sums[1], sums[2], sums[3]);
}
#endif

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], uint32_t a0, uint32_t a1,
                                                            uint32_t a2, uint32_t a3, uint32_t b0,
                                                            uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  const float4 sum = multiply_bfloat16(make_float4(c[0], c[1], c[2], c[3]), a0, a1, a2, a3, b0, b1);
  c[0] = sum.x, c[1] = sum.y, c[2] = sum.z, c[3] = sum.w;
#endif
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8
// (16-byte aligned).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  ldmatrix_x4(r, shared_address(row));
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  ldmatrix_x4_trans(r, shared_address(row));
}

__device__ __forceinline__ void store_shared(uint32_t target, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(target), "f"(value) : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t source) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(source)
               : "memory");
  return value;
}
__device__ __forceinline__ void store_shared(uint32_t target, const uint4& value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// Copies 16 bytes to shared memory, or writes zeros where `valid` is false (`source` is not read
// then).
__device__ __forceinline__ void copy_async_16(uint32_t target, const void* source, bool valid) {
#if __CUDA_ARCH__ >= 800
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
#else
  *static_cast<uint4*>(__cvta_shared_to_generic(target)) =
      valid ? *static_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void copy_async_16(void* target, const void* source, bool valid) {
  copy_async_16(shared_address(target), source, valid);
}

__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's newest groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace eet_patch::cuda
