// Attention over packed sequences for fp16 and bf16 on sm_90a: online softmax over tiles of keys
// (FlashAttention-2, Dao 2023, arXiv:2307.08691; -3, Shah et al. 2024, arXiv:2407.08608). Scores
// and probabilities stay in registers: sums of the first warpgroup product, operand of the second.
#pragma once

#include "common/attention_mask.cuh"
#include "common/bulk_copy.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "common/wgmma_registers.cuh"

namespace eet_patch::cuda {

constexpr int kWarpgroupQueries = 64;

// kWarpgroups times 64 queries of one head against tiles of kKeys keys, kStages of them in flight;
// kBlocks blocks a multiprocessor.
template <int kHeadDim_, int kWarpgroups_, int kKeys_, int kStages_, int kBlocks_>
struct PackedTile {
  static constexpr int kHeadDim = kHeadDim_, kWarpgroups = kWarpgroups_, kKeys = kKeys_,
                       kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kThreads = 128 * kWarpgroups, kQueries = kWarpgroupQueries * kWarpgroups;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kLineBytes = kRowBytes < kSwizzleBytes ? kRowBytes : kSwizzleBytes;
  static constexpr int kParts = kRowBytes / kLineBytes;  // a row's lines lie in a tile each
  static constexpr int kQueryBytes = kQueries * kRowBytes, kKeyBytes = kKeys * kRowBytes;
  // Behind the tiles: barriers for the queries, and for the keys, the values and the emptiness of
  // each stage; then where the sequence starts, and its length.
  static constexpr int kBarriers = 1 + 3 * kStages;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStages * kKeyBytes + 8 * kBarriers + 8;
  // The longest sequences served. With fewer than three stages none is filled a second time: the
  // scores of a tile are queued before the stage of the tile before is free.
  static constexpr int kMaxLength = kStages >= 3 ? 1 << 26 : kStages * kKeys;
  static_assert(kKeys % 16 == 0 && (kLineBytes == 64 || kLineBytes == 128));
};

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
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void store_four_matrices(uint32_t address, uint32_t r0, uint32_t r1,
                                                    uint32_t r2, uint32_t r3) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
#endif
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
  int length = static_cast<int>(p.cu_seqlens[index + 1]) - start;
  if (p.longest_first) {
    const int order = lane < count ? length * kWarpSize + kWarpSize - 1 - lane : -1;
    int rank = 0;
#pragma unroll
    for (int i = 0; i < kWarpSize; ++i) rank += __shfl_sync(kFullMask, order, i) > order;
    if (rank != wanted) start = length = 0;
  }
#if __CUDA_ARCH__ >= 800
  start = __reduce_max_sync(kFullMask, start);
  length = __reduce_max_sync(kFullMask, length);
#endif
  return {start, min(length, p.longest)};
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

// What a lane keeps of two rows, 16 w + g and the 8th behind it, of its warpgroup's 64 (w: warp, g:
// lane / 4), while tiles of keys go by.
template <typename T, typename Tile>
struct PackedRows {
  static constexpr int kColumns = Tile::kLineBytes / 2;  // of a part
  // The maximum that exponents are taken against may lag behind by this much, in units of log2: far
  // from overflow of fp16, and the sums need no new scale at most tiles.
  static constexpr float kSlack = 8.0f;

  float out[Tile::kParts][kColumns / 2];
  float scores[Tile::kKeys / 2];
  uint32_t probabilities[Tile::kKeys / 16][4];
  float maximum[2], total[2];  // maximum: scaled; total: over this lane's columns

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) out[part][i] = 0.0f;
    }
    maximum[0] = maximum[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
  }

  // Queues scores = queries @ keys^T.
  __device__ __forceinline__ void multiply_keys(uint32_t queries, uint32_t keys) {
    constexpr int kSteps = Tile::kLineBytes / 32;
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const uint64_t a =
          line_descriptor<Tile::kLineBytes>(queries + part * Tile::kQueries * Tile::kLineBytes);
      const uint64_t b =
          line_descriptor<Tile::kLineBytes>(keys + part * Tile::kKeys * Tile::kLineBytes);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        WarpgroupProduct<T, Tile::kKeys>::add(scores, a + step * kDescriptorStep,
                                              b + step * kDescriptorStep, part != 0 || step != 0);
      }
    }
    warpgroup_commit();
  }

  // Queues out += probabilities @ values.
  __device__ __forceinline__ void multiply_values(uint32_t values) {
    constexpr int kStep = 16 * Tile::kLineBytes >> 4;
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const uint64_t b =
          line_descriptor<Tile::kLineBytes>(values + part * Tile::kKeys * Tile::kLineBytes);
#pragma unroll
      for (int step = 0; step < Tile::kKeys / 16; ++step)
        WarpgroupRegisterProduct<T, kColumns>::add(out[part], probabilities[step],
                                                   b + step * kStep);
    }
    warpgroup_commit();
  }

  __device__ __forceinline__ void hold() {
    keep_in_place(scores);
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) keep_in_place(out[part]);
  }

  // Keys from `count` on are none of this sequence's.
  __device__ __forceinline__ void hide_from(int count) {
    const int column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 2; ++i) {
      if (i / 4 * 8 + column + i % 2 >= count) scores[i] = -INFINITY;
    }
  }

  // Scores to probabilities.
  __device__ __forceinline__ void exponentiate(float scale) {
    float highest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = fmaxf(scores[2 * half], scores[2 * half + 1]);
#pragma unroll
      for (int i = 4 + 2 * half; i < Tile::kKeys / 2; i += 4)
        highest[half] = fmaxf(highest[half], fmaxf(scores[i], scores[i + 1]));
      highest[half] = warp_max<4>(highest[half]) * scale;
    }
    const bool lags = highest[0] > maximum[0] + kSlack || highest[1] > maximum[1] + kSlack;
    if (__any_sync(kFullMask, lags)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float raised = fmaxf(maximum[half], highest[half]);
        // No finite score yet: nothing is summed up, and -inf - -inf would be NaN.
        const float correction = raised == -INFINITY ? 1.0f : exp2_fast(maximum[half] - raised);
        maximum[half] = raised;
        total[half] *= correction;
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
          for (int i = 2 * half; i < kColumns / 2; i += 4) {
            out[part][i] *= correction;
            out[part][i + 1] *= correction;
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shift = maximum[half] == -INFINITY ? 0.0f : maximum[half];
#pragma unroll
      for (int i = 2 * half; i < Tile::kKeys / 2; i += 4) {
        scores[i] = exp2_fast(fmaf(scores[i], scale, -shift));
        scores[i + 1] = exp2_fast(fmaf(scores[i + 1], scale, -shift));
        total[half] += scores[i] + scores[i + 1];
      }
    }
#pragma unroll
    for (int step = 0; step < Tile::kKeys / 16; ++step)
      pack_operand<T>(probabilities[step], scores + 8 * step);
  }

  // The warp's 16 rows over its part of `staging`, whose lines it alone uses; `rows` are stored.
  __device__ __forceinline__ void store(uint32_t staging, T* target, int64_t stride, int rows) {
    constexpr int kUnits = Tile::kLineBytes / kVectorBytes;  // a line
    constexpr int kPartBytes = Tile::kQueries * Tile::kLineBytes;
    const int lane = threadIdx.x % kWarpSize;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = warp_sum<4>(total[half]);
      inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
    // A line's 16-byte units are permuted so that no 8 addresses of an access meet in a bank.
    const auto unit_address = [&](int part, int row, int unit) {
      const int turn = kUnits == 8 ? row % 8 : row / 2 % 4;
      return staging + part * kPartBytes + row * Tile::kLineBytes + (unit ^ turn) * kVectorBytes;
    };
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
      for (int pair = 0; pair < kColumns / 16; ++pair) {
        const float* sums = out[part] + 8 * pair;
        store_four_matrices(unit_address(part, lane % 16, 2 * pair + lane / 16),
                            pack2<T>(sums[0] * inverse[0], sums[1] * inverse[0]),
                            pack2<T>(sums[2] * inverse[1], sums[3] * inverse[1]),
                            pack2<T>(sums[4] * inverse[0], sums[5] * inverse[0]),
                            pack2<T>(sums[6] * inverse[1], sums[7] * inverse[1]));
      }
    }
    __syncwarp();
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
      for (int step = 0; step < 16 * kUnits / kWarpSize; ++step) {
        const int index = step * kWarpSize + lane, row = index / kUnits, unit = index % kUnits;
        if (row < rows) {
          *reinterpret_cast<uint4*>(target + row * stride + part * kColumns +
                                    unit * kVectorSize<T>) =
              load_shared(unit_address(part, row, unit));
        }
      }
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
