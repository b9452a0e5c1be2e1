// The sizes of linear_stream.cuh, and the statistics of its layer norm.
#pragma once

#include "common/bulk_copy.cuh"
#include "cuda/linear_params.cuh"

namespace eet_patch::cuda {

constexpr int kStreamWarps = 4;  // each of them multiplies 16 columns of a tile
constexpr int kStreamWorkers = kStreamWarps * kWarpSize;
constexpr int kStreamThreads = kStreamWorkers + kWarpSize;

struct LinearMaps {
  CUtensorMap weight[3];
};

// kRows (8, 16, 32 or 64) bounds the rows of the batch.
template <int kRows>
struct StreamTile {
  static constexpr int kChunkK = 64;  // a chunk is kNormTile columns of kChunkK k: 8 KB
  static constexpr int kChunkBytes = kNormTile * kChunkK * 2;
  static constexpr int kMaxStages = 12;
  // Chunks behind the ring that come to L2 ahead: with few rows more were no faster on an H200.
  static constexpr int kPrefetchChunks = kRows <= 8 ? 0 : 8;
  static constexpr int kRowGroups = kRows / 8;  // products of n = 8
  // A part of the input: as much as a few registers of each thread hold.
  static constexpr int kPartK = kRows <= 8 ? 512 : kRows <= 16 ? 256 : kRows <= 32 ? 128 : 64;
  static constexpr int kPanels = 3;  // parts at a time, where not all of them stay
  static constexpr int kPartChunks = kPartK / kChunkK;
  static constexpr int kPartStride = kPartK + 8;  // elements; keeps fragments off shared banks
  static constexpr int kPartUnits = kPartK * 2 / kVectorBytes;     // of a row
  static constexpr int kRowStep = kStreamWorkers / kPartUnits;     // rows that are loaded at once
  static constexpr int kHeld = (kRows + kRowStep - 1) / kRowStep;  // units of a thread
  static constexpr int kSumStride = kNormTile + 4;                 // likewise
  static constexpr int kSmallBytes =
      (2 * kMaxStages + 1) * 8 + 2 * kRows * 4;  // barriers, statistics

  // Partial sums that one block receives: of its rows, from every rank.
  __host__ __device__ static constexpr int sum_bytes(int rows, int ranks) {
    return (rows + ranks - 1) / ranks * ranks * kSumStride * 4;
  }
  __host__ __device__ static constexpr int panel_bytes(int rows) { return rows * kPartStride * 2; }
};

// Mean and 1 / sqrt(variance + eps) of the block's rows of `features` elements, by kStreamWorkers /
// kRows lanes each, from what the producer left of each tile of them. Sums run about the first
// tile's mean, so that a large mean takes no digits away. The pointer is that of this lane's row,
// and stands before the wait for the producer.
template <int kRows>
__device__ __forceinline__ void merged_statistics(const float2* partials, int rows, int features,
                                                  float eps, float* means, float* scales) {
  constexpr int kLanes = kStreamWorkers / kRows;
  constexpr int kTogether = 4;
  const int part = threadIdx.x % kLanes;
  const int tiles = (features + kNormTile - 1) / kNormTile;
  const float last_count = features - (tiles - 1) * kNormTile;
  const float shift = __ldcg(partials).x;
  float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
  for (int first = part; first < tiles; first += kTogether * kLanes) {
    float2 loaded[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (first + i * kLanes < tiles) loaded[i] = __ldcg(partials + first + i * kLanes);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i * kLanes < tiles) {
        const float count = first + i * kLanes == tiles - 1 ? last_count : float(kNormTile);
        const float delta = loaded[i].x - shift, weighted = count * delta;
        sum += weighted;
        squares += fmaf(weighted, delta, loaded[i].y);
      }
    }
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, offset);
    squares += __shfl_xor_sync(kFullMask, squares, offset);
  }
  const int row = threadIdx.x / kLanes;
  if (part == 0 && row < rows) {
    const float inverse = __fdividef(1.0f, float(features)), mean = sum * inverse;
    means[row] = shift + mean;
    scales[row] = rsqrtf(fmaxf(fmaf(-mean, mean, squares * inverse), 0.0f) + eps);
  }
}

// Calls `finish` for the rows that a warp finishes, `count` of at most kSlots. Many of them share
// one copy of the code, which has to be fetched in each launch; what they keep lies in local
// memory.
template <int kSlots, typename Finish>
__device__ __forceinline__ void for_slots(int count, Finish&& finish) {
  if constexpr (kSlots <= 4) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot >= count) break;
      finish(slot);
    }
  } else {
#pragma unroll 1
    for (int slot = 0; slot < count; ++slot) finish(slot);
  }
}

__device__ __forceinline__ void workers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kStreamWorkers) : "memory");
}

}  // namespace eet_patch::cuda
