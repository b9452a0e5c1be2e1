// Attention over packed sequences for fp16 and bf16 on sm_90a: online softmax over tiles of keys
// (FlashAttention-2, Dao 2023, arXiv:2307.08691; -3, Shah et al. 2024, arXiv:2407.08608). Scores
// and probabilities stay in registers: sums of the first warpgroup product, operand of the second.
#pragma once

#include "common/launch.cuh"
#include "cuda/packed_attention_rows.cuh"

namespace eet_patch::cuda {

template <typename T>
struct PackedAttentionParams {
  CUtensorMap query, key, value;  // of (token, head, head_dim); a box is a line of 64 queries or of
                                  // kKeys keys of a head
  T* out;
  int64_t out_token_stride, out_head_stride;
  const int64_t* cu_seqlens;
  int group_size;      // query heads of a key/value head
  int longest;         // no sequence is longer
  bool longest_first;  // blocks take up to 32 sequences in the order of their lengths
  float scale;         // softmax_scale * log2(e), above 0
};

// One head's line of `box` tokens, from `token` on.
__device__ __forceinline__ void copy_head_box(uint32_t target, const CUtensorMap* map, int column,
                                              int head, int token, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3, %4}], [%5];" ::"r"(target),
      "l"(map), "r"(column), "r"(head), "r"(token), "r"(barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
struct PackedSequence {
  int start, length;
};

// How many warpgroups have something to do, where `queries` are left.
template <typename Tile>
__device__ __forceinline__ int warpgroups_of(int queries) {
  return max(0, min(Tile::kWarpgroups, (queries + kWarpgroupQueries - 1) / kWarpgroupQueries));
}

// A warp calls it: the blockIdx.z-th sequence, or the blockIdx.z-th longest. The reductions leave
// the result where the compiler knows it to be the same in all lanes, as bulk copies want it.
template <typename T>
__device__ __forceinline__ PackedSequence find_sequence(const PackedAttentionParams<T>& p) {
  const int lane = threadIdx.x % kWarpSize, wanted = blockIdx.z, count = gridDim.z;
  const int index = p.longest_first ? min(lane, count - 1) : wanted;
  int start = static_cast<int>(p.cu_seqlens[index]);
  int length = min(static_cast<int>(p.cu_seqlens[index + 1]) - start, p.longest);
  if (p.longest_first) {
    // Bit by bit from the highest: the lanes known to be longer, and those not known to differ.
    unsigned longer = 0, equal = __ballot_sync(kFullMask, lane < count);
    for (int bit = kWarpSize - 1 - __clz(p.longest); bit >= 0; --bit) {
      const bool is_set = length >> bit & 1;
      const unsigned set = __ballot_sync(kFullMask, is_set);
      if (!is_set) longer |= equal & set;
      equal &= is_set ? set : ~set;
    }
    const int rank = __popc(longer) + __popc(equal & ((1u << lane) - 1));
    if (rank != wanted || lane >= count) start = length = 0;
  }
#if __CUDA_ARCH__ >= 800
  start = __reduce_max_sync(kFullMask, start);
  length = __reduce_max_sync(kFullMask, length);
#endif
  return {start, length};
}

// Shared memory of a block, and the copies that fill it; one thread calls them.
template <typename T, typename Tile>
struct PackedStages {
  uint32_t base;

  __device__ __forceinline__ uint32_t queries() const { return base; }
  __device__ __forceinline__ uint32_t keys(int stage) const {
    return base + Tile::kQueryBytes + stage * 2 * Tile::kKeyBytes;
  }
  __device__ __forceinline__ uint32_t values(int stage) const {
    return keys(stage) + Tile::kKeyBytes;
  }
  __device__ __forceinline__ uint32_t barriers() const { return keys(Tile::kStages); }
  __device__ __forceinline__ uint32_t queries_full() const { return barriers(); }
  __device__ __forceinline__ uint32_t keys_full(int stage) const {
    return barriers() + 8 * (1 + stage);
  }
  __device__ __forceinline__ uint32_t values_full(int stage) const {
    return keys_full(Tile::kStages + stage);
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return keys_full(2 * Tile::kStages + stage);
  }

  __device__ __forceinline__ void bring_queries(const PackedAttentionParams<T>& p, int token,
                                                int warpgroups) const {
    constexpr int kBoxBytes = kWarpgroupQueries * Tile::kLineBytes;
    barrier_expect(queries_full(), warpgroups * Tile::kParts * kBoxBytes);
    for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll 1
      for (int i = 0; i < warpgroups; ++i) {
        copy_head_box(queries() + (part * Tile::kWarpgroups + i) * kBoxBytes, &p.query,
                      part * Tile::kLineBytes / 2, blockIdx.x, token + i * kWarpgroupQueries,
                      queries_full());
      }
    }
  }
  __device__ __forceinline__ void bring_tile(const PackedAttentionParams<T>& p, int start, int tile,
                                             int head) const {
    const int stage = tile % Tile::kStages;
    bring(&p.key, keys(stage), keys_full(stage), head, start + tile * Tile::kKeys);
    bring(&p.value, values(stage), values_full(stage), head, start + tile * Tile::kKeys);
  }
  __device__ __forceinline__ void bring(const CUtensorMap* map, uint32_t target, uint32_t barrier,
                                        int head, int token) const {
    barrier_expect(barrier, Tile::kKeyBytes);
    for (int part = 0; part < Tile::kParts; ++part) {
      copy_head_box(target + part * Tile::kKeys * Tile::kLineBytes, map,
                    part * Tile::kLineBytes / 2, head, token, barrier);
    }
  }
};

// A block owns up to Tile::kQueries queries of head blockIdx.x of one sequence, a warpgroup 64 of
// them. Its first thread brings queries, keys and values by bulk copies; a stage is filled again an
// iteration after it was left, so that warpgroups need not keep step. Queries and keys past the
// sequence's end are a neighbour's: such queries are not stored, such keys are hidden, and such
// values, which may be NaN, are overwritten with zeros. Reads queries once, keys and values once
// for each Tile::kQueries queries.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    packed_attention_kernel(const __grid_constant__ PackedAttentionParams<T> p) {
#if EET_HAS_WARPGROUP_PRODUCTS
  constexpr int kStages = Tile::kStages, kKeys = Tile::kKeys;
  extern __shared__ __align__(kBoxAlignment) unsigned char shared[];
  const PackedStages<T, Tile> stages{shared_address(shared)};
  volatile int* found = reinterpret_cast<int*>(shared + Tile::kSharedBytes - 8);
  // Broadcast, so that the compiler knows it to be the same in a warp.
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);
  const int lane = threadIdx.x % kWarpSize, warpgroup = warp / 4;
  const int first_query = blockIdx.y * Tile::kQueries;
  const int kv_head = p.group_size == 1 ? blockIdx.x : blockIdx.x / p.group_size;

  release_dependents();
  if (warp == 0) {
    if (lane == 0) {
      prefetch_map(&p.query);
      prefetch_map(&p.key);
      prefetch_map(&p.value);
#pragma unroll 1
      for (int i = 0; i < 1 + 2 * kStages; ++i) barrier_init(stages.barriers() + 8 * i, 1);
      barrier_init_fence();
    }
    wait_for_predecessor();
    const PackedSequence sequence = find_sequence(p);
    const int first_token = sequence.start + first_query;
    const int warpgroups = warpgroups_of<Tile>(sequence.length - first_query);
    if (lane == 0) {
      found[0] = sequence.start;
      found[1] = sequence.length;
      if (warpgroups > 0) {
        stages.bring_queries(p, first_token, warpgroups);
#pragma unroll
        for (int tile = 0; tile < kStages; ++tile) {
          if (tile * kKeys < sequence.length) stages.bring_tile(p, sequence.start, tile, kv_head);
        }
        if (sequence.length > kStages * kKeys) {
          for (int stage = 0; stage < kStages; ++stage)
            barrier_init(stages.empty(stage), 4 * warpgroups);
        }
      }
    }
    __syncwarp();
  }
  __syncthreads();
  const int start = found[0], length = found[1];
  const int warpgroups = warpgroups_of<Tile>(length - first_query);
  if (warpgroup >= warpgroups) return;

  const int tiles = (length + kKeys - 1) / kKeys;
  const uint32_t queries = stages.queries() + warpgroup * kWarpgroupQueries * Tile::kLineBytes;
  PackedRows<T, Tile> rows;
  rows.clear();
  barrier_wait(stages.queries_full(), 0);
  barrier_wait(stages.keys_full(0), 0);
  rows.hold();
  warpgroup_fence();
  rows.multiply_keys(queries, stages.keys(0));
  warpgroup_wait<0>();
  rows.hold();
  int stage = 0;
  uint32_t parity = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int visible = length - tile * kKeys;
    barrier_wait(stages.values_full(stage), parity);
    if (visible < kKeys) {  // in the last tile only
      rows.hide_from(visible);
#pragma unroll
      for (int part = 0; part < Tile::kParts; ++part) {
        const uint32_t part_values = stages.values(stage) + part * kKeys * Tile::kLineBytes;
        for (int at = visible * Tile::kLineBytes + threadIdx.x * kVectorBytes;
             at < kKeys * Tile::kLineBytes; at += warpgroups * 128 * kVectorBytes) {
          store_shared(part_values + at, make_uint4(0, 0, 0, 0));
        }
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      sync_threads(1, warpgroups * 128);
    }
    rows.exponentiate(p.scale);
    rows.hold();
    warpgroup_fence();
    rows.multiply_values(stages.values(stage));
    int next = stage + 1;
    uint32_t next_parity = parity;
    if (next == kStages) next = 0, next_parity ^= 1;
    if (tile + 1 < tiles) {
      barrier_wait(stages.keys_full(next), next_parity);
      warpgroup_fence();
      rows.multiply_keys(queries, stages.keys(next));
    }
    warpgroup_wait<0>();
    rows.hold();
    if constexpr (kStages >= 3) {
      if (lane == 0 && tile + kStages < tiles) barrier_arrive(stages.empty(stage));
      const int refill = tile - 1 + kStages;
      if (threadIdx.x == 0 && tile > 0 && refill < tiles) {
        const int before = (tile - 1) % kStages;
        barrier_wait(stages.empty(before), (tile - 1) / kStages % 2);
        stages.bring_tile(p, start, refill, kv_head);
      }
      __syncwarp();
    }
    stage = next;
    parity = next_parity;
  }

  sync_threads(2 + warpgroup, 128);  // the queries are no longer read
  const int warp_row = warp * 16;    // of the block's, as warpgroups follow one another
  T* target = p.out + (int64_t(start) + first_query + warp_row) * p.out_token_stride +
              blockIdx.x * p.out_head_stride;
  rows.store(stages.queries() + warp_row * Tile::kLineBytes, target, p.out_token_stride,
             length - first_query - warp_row);
#else
  __trap();  // never silently nothing
#endif
}

}  // namespace eet_patch::cuda
