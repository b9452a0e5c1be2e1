// Reductions over a warp and over a group of warps, always in the same order.
#pragma once

#include <cuda_runtime.h>

namespace eet_patch::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Over aligned groups of kLanes lanes; every lane gets the result.
template <int kLanes = kWarpSize>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

template <int kLanes = kWarpSize>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
  return value;
}

// Sum over the block's kWarps warps (one warp: no shared memory, no barrier). `shared` holds kWarps
// floats and may be used again at once: the second barrier lets every reader finish.
template <int kWarps>
__device__ __forceinline__ float block_sum(float value, float* shared) {
  value = warp_sum(value);
  if constexpr (kWarps > 1) {
    if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) value += shared[warp];
    __syncthreads();
  }
  return value;
}

}  // namespace eet_patch::cuda
