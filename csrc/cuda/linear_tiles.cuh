// Product of many rows for fp16 and bf16 on sm_90a, with bias, activation or residual added while
// the sums are still in registers. One thread brings tiles of the input and the weight through a
// ring in shared memory by bulk tensor copies; two warpgroups multiply. In turns, each of them owns
// whole tiles, so that what one does behind its sums (an erf costs as much as 100 columns of k)
// runs under the products of the other; together, they share a tile, for shapes that give a
// multiprocessor one tile only. A pair of blocks may share one of the operands: each brings half of
// it to both.
// Source: the division of labour is that of CUTLASS's ping-pong and cooperative kernels.
#pragma once

#include <algorithm>

#include "common/activation.cuh"
#include "common/bulk_copy.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/vector.cuh"
#include "common/wgmma.cuh"
#include "cuda/linear_tiles.h"

namespace eet_patch::cuda {

constexpr int kTileK = kSwizzleBytes / 2;  // of one stage
constexpr int kWarpgroupThreads = 128;
constexpr int kTileThreads = 3 * kWarpgroupThreads;  // the first warpgroup brings tiles
constexpr int kTileWarps = 8;                        // those that multiply
constexpr int kTileSharedBytes = 227 * 1024;
constexpr uint16_t kPairMembers = 3;  // a bit a block of the cluster

// kHalves: how many times 64 rows a warpgroup sums up at a time.
template <int kHalves, int kN, bool kTogether>
struct LinearTile {
  static constexpr int kRows = 64 * kHalves * (kTogether ? 2 : 1);
  static constexpr int kInputBytes = kRows * kSwizzleBytes, kWeightBytes = kN * kSwizzleBytes;
  static constexpr int kStageBytes = kInputBytes + kWeightBytes;
  // A warp's 16 rows on their way out; an odd number of 16-byte units keeps rows off one bank.
  static constexpr int kPitch = kN * 2 + kVectorBytes;
  static constexpr int kWarpBytes = 16 * kPitch + kN * 2;  // and a bias
  static constexpr int kMaxStages = 8;
  static constexpr int kStages = std::min(
      kMaxStages, (kTileSharedBytes - kTileWarps * kWarpBytes - 16 * kMaxStages) / kStageBytes);
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kTileWarps * kWarpBytes + 16 * kStages;
  // 168 a thread at the start. The widest sums need all that the producer can do without.
  static constexpr int kProducerRegisters = kHalves * kN > 400 ? 24 : 40;
  static constexpr int kConsumerRegisters = kHalves * kN > 400 ? 240 : 232;
  static_assert(kStages >= 3 && kN % 16 == 0);
};

template <typename T>
struct LinearTileParams {
  CUtensorMap input, weight[3];  // boxes of kTileK columns; half a tile's lines if shared by a pair
  const T* bias[3];
  T* out;
  const T* residual;
  int64_t out_stride;
  int rows, out_features, num_weights;
  int k_blocks, row_blocks, column_blocks;  // column_blocks: of one weight
  TilePair pair;
  Activation activation;
};

// What does not depend on the tile.
template <typename T>
LinearTileParams<T> tile_params(const LinearArgs& args) {
  LinearTileParams<T> p = {};
  for (int i = 0; i < args.num_weights; ++i) p.bias[i] = static_cast<const T*>(args.bias[i]);
  p.out = static_cast<T*>(args.out);
  p.residual = static_cast<const T*>(args.residual);
  p.out_stride = args.out_stride;
  p.rows = static_cast<int>(args.rows);
  p.out_features = static_cast<int>(args.out_features);
  p.num_weights = args.num_weights;
  p.k_blocks = static_cast<int>(ceil_div(args.in_features, kTileK));
  p.activation = args.activation;
  return p;
}

// Which tile a block works at. Blocks walk the tiles of a row of tiles first, pairs of blocks pairs
// of them; the last of a pair may lie outside, where copies yield zeros and nothing is stored.
template <typename T>
struct TileWalk {
  int ranks, rank, groups, group, columns, total;
  TilePair pair;

  __device__ explicit TileWalk(const LinearTileParams<T>& p) : pair(p.pair) {
    ranks = pair == TilePair::kNone ? 1 : 2;
    rank = blockIdx.x % ranks;
    group = blockIdx.x / ranks;
    groups = gridDim.x / ranks;
    const int all_columns = p.column_blocks * p.num_weights;
    columns = pair == TilePair::kInput ? (all_columns + 1) / 2 : all_columns;
    total = columns * (pair == TilePair::kWeight ? (p.row_blocks + 1) / 2 : p.row_blocks);
  }
  __device__ int row_block(int index) const {
    return pair == TilePair::kWeight ? index / columns * 2 + rank : index / columns;
  }
  __device__ int column_block(int index) const {
    return pair == TilePair::kInput ? index % columns * 2 + rank : index % columns;
  }
};

__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in_rank(barrier, rank))
               : "memory");
#endif
}
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}
// The thread that brings tiles: of stage s it waits for `empty`, and the copies count at `full`.
template <typename T, typename Tile>
__device__ void bring_tiles(const LinearTileParams<T>& p, const TileWalk<T>& walk, uint32_t stages,
                            uint32_t full, uint32_t empty) {
  const bool input_shared = walk.pair == TilePair::kInput;
  const bool weight_shared = walk.pair == TilePair::kWeight;
  // Of what is shared, this block brings the lines of its rank.
  const int input_from = input_shared ? walk.rank * (Tile::kRows / 2) : 0;
  const int weight_lines = Tile::kWeightBytes / kSwizzleBytes;
  const int weight_from = weight_shared ? walk.rank * (weight_lines / 2) : 0;
  int stage = 0;
  uint32_t parity = 1;  // the first round finds every stage empty
  for (int index = walk.group; index < walk.total; index += walk.groups) {
    const int row = walk.row_block(index) * Tile::kRows + input_from;
    const int column_block = walk.column_block(index);
    const int which = min(column_block / p.column_blocks, p.num_weights - 1);
    const int column = (column_block - which * p.column_blocks) * weight_lines + weight_from;
    const CUtensorMap* weight_map = p.weight + which;
    for (int block = 0; block < p.k_blocks; ++block) {
      const uint32_t input_target = stages + stage * Tile::kStageBytes + input_from * kSwizzleBytes;
      const uint32_t weight_target =
          stages + stage * Tile::kStageBytes + Tile::kInputBytes + weight_from * kSwizzleBytes;
      const uint32_t barrier = full + 8 * stage;
      barrier_wait(empty + 8 * stage, parity);
      barrier_expect(barrier, Tile::kStageBytes);
      if (input_shared) {
        copy_box_to_members(input_target, &p.input, block * kTileK, row, barrier, kPairMembers);
      } else {
        copy_box(input_target, &p.input, block * kTileK, row, barrier);
      }
      if (weight_shared) {
        copy_box_to_members(weight_target, weight_map, block * kTileK, column, barrier,
                            kPairMembers);
      } else {
        copy_box(weight_target, weight_map, block * kTileK, column, barrier);
      }
      if (++stage == Tile::kStages) stage = 0, parity ^= 1;
    }
  }
}

// Turns of the two warpgroups. A parity tells a phase of a barrier from the one before it only, so
// that a warpgroup must not wait for stages before all earlier ones have come.
__device__ __forceinline__ void await_turn(int warpgroup) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + warpgroup), "n"(2 * kWarpgroupThreads) : "memory");
}
__device__ __forceinline__ void give_turn(int warpgroup) {
  asm volatile("bar.arrive %0, %1;" ::"r"(1 + warpgroup), "n"(2 * kWarpgroupThreads) : "memory");
}

enum class TileFinish { kLinear, kGelu, kOther };

// Queues the copy of a warp's 16 rows of the residual to where its sums will pass by.
template <typename T, int kN>
__device__ __forceinline__ void fetch_rows(unsigned char* staging, const T* source, int64_t stride,
                                           int rows, int columns) {
  constexpr int kUnits = kN / kVectorSize<T>;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 2
  for (int unit = lane; unit < 16 * kUnits; unit += kWarpSize) {
    const int row = unit / kUnits, column = unit % kUnits;
    copy_async_16(staging + row * LinearTile<1, kN, false>::kPitch + column * kVectorBytes,
                  source + row * stride + column * kVectorSize<T>,
                  row < rows && column * kVectorSize<T> < columns);
  }
  copy_async_commit();
}

// A warp's 16 rows of sums to memory: + bias, activation or residual, rounded once. `staging` is
// the warp's own; there stands the residual if it `adds` one, and behind its rows the bias.
// `columns` of the tile, which starts at `out`, are stored, and `rows` of the 16. Eight values at a
// time, whose chains of instructions interleave.
template <typename T, int kN, TileFinish kFinish>
__device__ __forceinline__ void finish_rows(const float (&sums)[kN / 2], unsigned char* staging,
                                            T* out, int64_t out_stride, int rows, int columns,
                                            bool adds, Activation activation) {
  constexpr int kPitch = LinearTile<1, kN, false>::kPitch;
  constexpr int kUnits = kN / kVectorSize<T>;  // of 16 bytes, a row
  constexpr int kSteps = 16 * kUnits / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const unsigned char* bias = staging + 16 * kPitch + (lane % 4) * 4;
  // Lane l addresses row l % 8 of matrix l / 8: rows 0 to 7, 8 to 15, then the next 8 columns.
  const uint32_t matrix_address =
      shared_address(staging) + (lane % 16) * kPitch + (lane / 16) * kVectorBytes;
  if (kFinish == TileFinish::kLinear && adds) {
    copy_async_wait<0>();
    __syncwarp();
  }
#pragma unroll
  for (int j = 0; j < kN / 16; ++j) {
    float values[8];
    uint32_t packed[4];
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      const float2 added =
          unpack2<T>(*reinterpret_cast<const uint32_t*>(bias + 32 * j + 16 * eight));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        values[4 * eight + i] = sums[8 * j + 4 * eight + i] + (i % 2 == 0 ? added.x : added.y);
    }
    if constexpr (kFinish == TileFinish::kGelu) {
      gelu_fast(values);
    } else if constexpr (kFinish == TileFinish::kOther) {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = activate_fast(values[i], activation);
    } else if (adds) {
      ldmatrix_x4(packed, matrix_address + j * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 other = unpack2<T>(packed[i]);
        values[2 * i] += other.x;
        values[2 * i + 1] += other.y;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
    store_matrices(matrix_address + j * 32, packed);
  }
  __syncwarp();
#pragma unroll 2
  for (int step = 0; step < kSteps; ++step) {
    const int unit = step * kWarpSize + lane, row = unit / kUnits, column = unit % kUnits;
    if (row < rows && column * kVectorSize<T> < columns)
      *reinterpret_cast<uint4*>(out + row * out_stride + column * kVectorSize<T>) =
          *reinterpret_cast<const uint4*>(staging + row * kPitch + column * kVectorBytes);
  }
  __syncwarp();
}

// A block walks tiles of Tile::kRows rows by kN columns of one weight. Dynamic shared memory: the
// ring, 16 rows of output of each warp, two barriers a stage. Limits: in_features, out_features and
// out_stride multiples of 8, 16-byte aligned operands. Moves every input tile once for each column
// of tiles and every weight tile once for each row of tiles, mostly from L2.
template <typename T, int kHalves, int kN, bool kTogether>
__global__ void __launch_bounds__(kTileThreads, 1)
    linear_tile_kernel(const __grid_constant__ LinearTileParams<T> p) {
#if EET_HAS_WARPGROUP_PRODUCTS
  using Tile = LinearTile<kHalves, kN, kTogether>;
  using Product = WarpgroupProduct<T, kN>;
  extern __shared__ __align__(kBoxAlignment) unsigned char shared[];
  const uint32_t stages = shared_address(shared);
  unsigned char* staging = shared + Tile::kStages * Tile::kStageBytes;
  const uint32_t full = shared_address(staging + kTileWarps * Tile::kWarpBytes);
  const uint32_t empty = full + 8 * Tile::kStages;
  const TileWalk<T> walk(p);

  if (threadIdx.x == 0) {
    for (int s = 0; s < Tile::kStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, (kTogether ? kTileWarps : kTileWarps / 2) * walk.ranks);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (walk.ranks > 1) cluster_arrive(), cluster_wait();

  // Broadcast, so that the compiler knows it to be the same in a warp.
  const int warpgroup = __shfl_sync(kFullMask, threadIdx.x / kWarpgroupThreads, 0) - 1;
  if (warpgroup < 0) {
    give_registers<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) {
      wait_for_predecessor();
      bring_tiles<T, Tile>(p, walk, stages, full, empty);
      release_dependents();
    }
    __syncwarp();
  } else {
    take_registers<Tile::kConsumerRegisters>();
    wait_for_predecessor();
    const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0) - 4;
    const int lane = threadIdx.x % kWarpSize;
    const int turn = kTogether ? 0 : warpgroup, turns = kTogether ? 1 : 2;
    const int rows_from = kTogether ? warpgroup * 64 * kHalves : 0;
    int position = turn * p.k_blocks;  // in the sequence of stages
    for (int index = walk.group + turn * walk.groups; index < walk.total;
         index += turns * walk.groups, position += (turns - 1) * p.k_blocks) {
      const int column_block = walk.column_block(index);
      const int which = min(column_block / p.column_blocks, p.num_weights - 1);
      const int column = (column_block - which * p.column_blocks) * kN;
      const int columns = p.out_features - column;
      const int row0 = walk.row_block(index) * Tile::kRows + rows_from + warp % 4 * 16;
      const int64_t out_from = row0 * p.out_stride + int64_t(which) * p.out_features + column;
      unsigned char* own = staging + warp * Tile::kWarpBytes;
      const bool adds = p.residual != nullptr;
      if (adds) {
        fetch_rows<T, kN>(own, p.residual + out_from, p.out_stride, p.rows - row0, columns);
      }
      uint4 bias = make_uint4(0, 0, 0, 0);
      if (p.bias[which] != nullptr && lane < kN / 8 && column + 8 * lane < p.out_features)
        bias = __ldg(reinterpret_cast<const uint4*>(p.bias[which] + column + 8 * lane));
      float sums[kHalves][kN / 2];
      int stage = position % Tile::kStages;
      uint32_t parity = position / Tile::kStages % 2;
      int done = stage;  // the stage before, still being read
      if (!kTogether && index != walk.group) await_turn(warpgroup);
      for (int block = 0; block < p.k_blocks; ++block) {
        barrier_wait(full + 8 * stage, parity);
        if (!kTogether && block == p.k_blocks - 1 && index + walk.groups < walk.total)
          give_turn(1 - warpgroup);
        const uint32_t tile = stages + stage * Tile::kStageBytes;
        const uint64_t input = tile_descriptor(tile + rows_from * kSwizzleBytes);
        const uint64_t weight = tile_descriptor(tile + Tile::kInputBytes);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) keep_in_place(sums[half]);
        warpgroup_fence();
#pragma unroll
        for (int step = 0; step < kTileK / 16; ++step) {
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            Product::add(sums[half], input + half * kDescriptorHalf + step * kDescriptorStep,
                         weight + step * kDescriptorStep, block != 0 || step != 0);
          }
        }
        warpgroup_commit();
#pragma unroll
        for (int half = 0; half < kHalves; ++half) keep_in_place(sums[half]);
        warpgroup_wait<1>();
        if (block != 0 && lane < walk.ranks) {
          if (walk.ranks == 1) {
            barrier_arrive(empty + 8 * done);
          } else {
            barrier_arrive_at(empty + 8 * done, lane);
          }
        }
        done = stage;
        if (++stage == Tile::kStages) stage = 0, parity ^= 1;
      }
      position += p.k_blocks;
      warpgroup_wait<0>();
#pragma unroll
      for (int half = 0; half < kHalves; ++half) keep_in_place(sums[half]);
      if (lane < walk.ranks) {
        if (walk.ranks == 1) {
          barrier_arrive(empty + 8 * done);
        } else {
          barrier_arrive_at(empty + 8 * done, lane);
        }
      }

      copy_async_wait<0>();  // also where nothing is stored, since the next tile's go to the same
                             // place
      if (columns <= 0) continue;
      if (lane < kN / 8)
        *reinterpret_cast<uint4*>(own + 16 * Tile::kPitch + lane * kVectorBytes) = bias;
      __syncwarp();
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int rows = p.rows - row0 - half * 64;
        if (rows <= 0) break;
        const int64_t from = out_from + half * 64 * p.out_stride;
        if (half != 0 && adds)
          fetch_rows<T, kN>(own, p.residual + from, p.out_stride, rows, columns);
        T* out = p.out + from;
        if (p.activation == Activation::kGeluErf) {
          finish_rows<T, kN, TileFinish::kGelu>(sums[half], own, out, p.out_stride, rows, columns,
                                                false, p.activation);
        } else if (p.activation == Activation::kNone) {
          finish_rows<T, kN, TileFinish::kLinear>(sums[half], own, out, p.out_stride, rows, columns,
                                                  adds, p.activation);
        } else {
          finish_rows<T, kN, TileFinish::kOther>(sums[half], own, out, p.out_stride, rows, columns,
                                                 false, p.activation);
        }
      }
    }
  }
  // A block's shared memory stays as long as the other may copy to it or arrive there.
  if (walk.ranks > 1) cluster_arrive(), cluster_wait();
#else
  __trap();  // never silently nothing
#endif
}

}  // namespace eet_patch::cuda
