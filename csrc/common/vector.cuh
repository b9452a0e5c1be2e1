// Vector loads and stores that widen to float and round back, and the streaming loads of weights
// and caches.
#pragma once

#include "common/convert.cuh"

namespace eet_patch::cuda {

constexpr int kVectorBytes = 16;
template <typename T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T data[kCount];
};

// `source` must be aligned to kCount elements.
template <int kCount, typename T>
__device__ __forceinline__ void load_vector(const T* source, float (&values)[kCount]) {
  const Vector<T, kCount> vector = *reinterpret_cast<const Vector<T, kCount>*>(source);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = to_float(vector.data[i]);
}

template <int kCount, typename T>
__device__ __forceinline__ void store_vector(T* target, const float (&values)[kCount]) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.data[i] = from_float<T>(values[i]);
  *reinterpret_cast<Vector<T, kCount>*>(target) = vector;
}

template <typename T>
__device__ __forceinline__ void unpack_vector(const uint4& packed,
                                              float (&values)[kVectorSize<T>]) {
  if constexpr (sizeof(T) == 4) {
    values[0] = __uint_as_float(packed.x);
    values[1] = __uint_as_float(packed.y);
    values[2] = __uint_as_float(packed.z);
    values[3] = __uint_as_float(packed.w);
  } else {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(words[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

// Weights: read once a call by one block, so they pass by L1, and read-only for the kernel's whole
// life.
__device__ __forceinline__ uint4 load_weights(const void* source) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source));
  return value;
}

// Caches: read once too, but the kernel before this one may have written them, so never through the
// read-only path.
__device__ __forceinline__ uint4 load_cache(const void* source) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source)
               : "memory");
  return value;
}

// What another multiprocessor may just have written: never from L1, and asked for where it stands
// in the code, however far ahead of its use.
__device__ __forceinline__ uint4 load_input(const void* source) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source)
               : "memory");
  return value;
}

// One 16-bit element that another multiprocessor may just have written: never from L1.
template <typename T>
__device__ __forceinline__ T load_fresh(const T* source) {
  static_assert(sizeof(T) == 2);
  const unsigned short bits = __ldcg(reinterpret_cast<const unsigned short*>(source));
  return reinterpret_cast<const T&>(bits);
}

inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0;
}

}  // namespace eet_patch::cuda
