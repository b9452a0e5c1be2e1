// Thread block clusters: rank, start-up barrier, and stores to the shared memory of another block
// of the cluster. Before sm_90, and without a cluster, a block is rank 0 of 1.
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

// Every thread of every block of the cluster calls both, in this order: after the wait all of them
// have started. Orders no memory (a fence here costs more than the barrier).
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The same in one, and what the blocks have written to each other's shared memory is seen behind
// it.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Where an address of this block's shared memory lies in the block `rank`.
__device__ __forceinline__ uint32_t address_in_rank(uint32_t address, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
#else
  return address;
#endif
}

// Stores two floats in a block of the cluster, which has started: an address of address_in_rank.
__device__ __forceinline__ void store_in_cluster(uint32_t address, float first, float second) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second)
               : "memory");
#endif
}

// Stores 4 bytes in a block of the cluster, which has started, and counts them at a barrier there
// (bulk_copy.cuh): both addresses of address_in_rank. Who waits for the barrier sees them.
__device__ __forceinline__ void push(uint32_t target, float value, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(target),
      "r"(__float_as_uint(value)), "r"(barrier)
      : "memory");
#endif
}

}  // namespace eet_patch::cuda
