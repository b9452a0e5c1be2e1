// Product of some hundred rows for fp16 and bf16 on sm_90a, where tiles of their own would leave
// most multiprocessors idle: the blocks of a cluster share a tile and split its k. Each pushes its
// partial sums to the blocks that finish the rows, 16 rows at a time, which add them in a fixed
// order. Weights are on their way before the kernel ahead has ended (programmatic dependent
// launch).
#pragma once

#include "cuda/linear_tiles.cuh"

namespace eet_patch::cuda {

template <int kN>
struct SplitTile {
  static constexpr int kRows = 128, kSlabRows = 16, kSlabs = kRows / kSlabRows;
  static constexpr int kInputBytes = kRows * kSwizzleBytes, kWeightBytes = kN * kSwizzleBytes;
  static constexpr int kStageBytes = kInputBytes + kWeightBytes;
  static constexpr int kSlabPitch = kN + 8;  // floats: 4 rows of pairs hit all banks once
  static constexpr int kSlabBytes = kSlabRows * kSlabPitch * 4;
  static constexpr int kReceiveBytes = 12 * kSlabBytes;  // slabs a rank, times ranks, at most
  static constexpr int kMaxStages = 8;
  static constexpr int kStages =
      std::min(kMaxStages, (kTileSharedBytes - kReceiveBytes - 16 * kMaxStages) / kStageBytes);
  static constexpr int kSharedBytes = kStages * kStageBytes + kReceiveBytes + 16 * kStages;
};

// A cluster owns a tile of 128 rows by kN columns of one weight; each rank k_per_rank blocks of its
// k. The first warpgroup brings tiles, the others own 64 rows each. Dynamic shared memory: the
// ring, slabs of 16 rows of partial sums, two barriers a stage. Limits: those of
// linear_tile_kernel; clusters of 2, 3, 4, 6 or 8. weights_first: the kernel ahead wrote none of
// the weights.
template <typename T, int kN>
__global__ void __launch_bounds__(kTileThreads, 1)
    linear_split_kernel(const __grid_constant__ LinearTileParams<T> p, int k_per_rank,
                        bool weights_first) {
#if EET_HAS_WARPGROUP_PRODUCTS
  using Tile = SplitTile<kN>;
  extern __shared__ __align__(kBoxAlignment) unsigned char shared[];
  const uint32_t stages = shared_address(shared);
  float* received = reinterpret_cast<float*>(shared + Tile::kStages * Tile::kStageBytes);
  const uint32_t full = shared_address(received) + Tile::kReceiveBytes;
  const uint32_t empty = full + 8 * Tile::kStages;
  const int rank = cluster_rank(), ranks = cluster_size();
  const int columns_of_blocks = p.column_blocks * p.num_weights;
  const int tile = blockIdx.x / ranks;
  const int row_from = tile / columns_of_blocks * Tile::kRows;
  const int column_block = tile % columns_of_blocks;
  const int which = column_block / p.column_blocks;
  const int column_from = (column_block - which * p.column_blocks) * kN;
  const int k_begin = rank * k_per_rank;
  const int k_blocks = max(0, min(p.k_blocks - k_begin, k_per_rank));

  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::kStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, kTileWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  cluster_arrive();
  release_dependents();

  const int warpgroup = __shfl_sync(kFullMask, threadIdx.x / kWarpgroupThreads, 0) - 1;
  if (warpgroup < 0) {
    if (threadIdx.x == 0) {
      const CUtensorMap* weight_map = p.weight + which;
      const auto bring_weight = [&](int block, int stage) {
        barrier_expect(full + 8 * stage, Tile::kStageBytes);
        copy_box(stages + stage * Tile::kStageBytes + Tile::kInputBytes, weight_map,
                 (k_begin + block) * kTileK, column_from, full + 8 * stage);
      };
      const auto bring_input = [&](int block, int stage) {
        copy_box(stages + stage * Tile::kStageBytes, &p.input, (k_begin + block) * kTileK, row_from,
                 full + 8 * stage);
      };
      const int first = min(k_blocks, Tile::kStages);
      if (!weights_first) wait_for_predecessor();
      for (int block = 0; block < first; ++block) bring_weight(block, block);
      if (weights_first) wait_for_predecessor();
      for (int block = 0; block < first; ++block) bring_input(block, block);
      int stage = 0;
      uint32_t parity = 0;
      for (int block = first; block < k_blocks; ++block) {
        barrier_wait(empty + 8 * stage, parity);
        bring_weight(block, stage);
        bring_input(block, stage);
        if (++stage == Tile::kStages) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();
    cluster_wait();
    cluster_sync();
    return;
  }

  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0) - 4;
  const int lane = threadIdx.x % kWarpSize;
  float sums[kN / 2];
  if (k_blocks == 0) {
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
  }
  int stage = 0, done = 0;
  uint32_t parity = 0;
  for (int block = 0; block < k_blocks; ++block) {
    barrier_wait(full + 8 * stage, parity);
    const uint32_t at = stages + stage * Tile::kStageBytes;
    const uint64_t input = tile_descriptor(at + warpgroup * 64 * kSwizzleBytes);
    const uint64_t weight = tile_descriptor(at + Tile::kInputBytes);
    keep_in_place(sums);
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
      WarpgroupProduct<T, kN>::add(sums, input + step * kDescriptorStep,
                                   weight + step * kDescriptorStep, block != 0 || step != 0);
    }
    warpgroup_commit();
    keep_in_place(sums);
    warpgroup_wait<1>();
    if (block != 0 && lane == 0) barrier_arrive(empty + 8 * done);
    done = stage;
    if (++stage == Tile::kStages) stage = 0, parity ^= 1;
  }
  warpgroup_wait<0>();
  keep_in_place(sums);

  // Slab s, the rows of warp s, goes to rank s % ranks.
  cluster_wait();
  const int slot = warp / ranks * ranks + rank;
  const uint32_t target = address_in_rank(shared_address(received) + slot * Tile::kSlabBytes +
                                              (lane / 4 * Tile::kSlabPitch + lane % 4 * 2) * 4,
                                          warp % ranks);
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    store_in_cluster(target + j * 32, sums[4 * j], sums[4 * j + 1]);
    store_in_cluster(target + j * 32 + 8 * Tile::kSlabPitch * 4, sums[4 * j + 2], sums[4 * j + 3]);
  }
  cluster_sync();

  wait_for_predecessor();  // the residual, and out itself, may be its
  constexpr int kUnits = kN / 8, kSlabUnits = Tile::kSlabRows * kUnits;
  const int slabs = (Tile::kSlabs - rank + ranks - 1) / ranks;
  for (int unit = threadIdx.x - kWarpgroupThreads; unit < slabs * kSlabUnits;
       unit += kTileWarps * kWarpSize) {
    const int own = unit / kSlabUnits, slab_row = unit % kSlabUnits / kUnits;
    const int column = unit % kUnits * 8, row = row_from + (own * ranks + rank) * 16 + slab_row;
    if (row >= p.rows || column_from + column >= p.out_features) continue;
    float values[8] = {};
    if (p.bias[which] != nullptr) load_vector(p.bias[which] + column_from + column, values);
    for (int from = 0; from < ranks; ++from) {
      const float4* part =
          reinterpret_cast<const float4*>(received + (own * ranks + from) * (Tile::kSlabBytes / 4) +
                                          slab_row * Tile::kSlabPitch + column);
      const float4 low = part[0], high = part[1];
      values[0] += low.x, values[1] += low.y, values[2] += low.z, values[3] += low.w;
      values[4] += high.x, values[5] += high.y, values[6] += high.z, values[7] += high.w;
    }
    const int64_t at = row * p.out_stride + int64_t(which) * p.out_features + column_from + column;
    if (p.activation == Activation::kGeluErf) {
      gelu_fast(values);
    } else if (p.activation != Activation::kNone) {
#pragma unroll
      for (float& value : values) value = activate_fast(value, p.activation);
    } else if (p.residual != nullptr) {
      float other[8];
      unpack_vector<T>(load_input(p.residual + at), other);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] += other[i];
    }
    store_vector(p.out + at, values);
  }
#else
  __trap();
#endif
}

}  // namespace eet_patch::cuda
