// Thread block clusters: rank, barrier in two halves, and stores to the shared memory of another
// block of the cluster. Before sm_90, and without a cluster, a block is rank 0 of 1.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace eet_patch::cuda {

constexpr int kMaxClusterSize = 8;  // what every chip with clusters can place

__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

// Every thread of every block of the cluster calls both, in this order. What was stored before the
// arrival, in any block's shared memory, is seen after the wait.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Stores to where `target`, an address of this block's shared memory, lies in the block `rank`.
// That block must have started, and must not end before it.
__device__ __forceinline__ void store_to_rank(float* target, int rank, float value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(own), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#else
  *target = value;
#endif
}

}  // namespace eet_patch::cuda
