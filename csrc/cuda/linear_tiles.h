// The tiles that products of many rows (linear_tiles.cuh) come in, and who shares what.
#pragma once

#include <cuda_runtime.h>

#include "ops.h"

namespace eet_patch::cuda {

// What two neighbouring blocks bring for each other: nothing, the input (they stand side by side in
// a row of tiles), or the weight (one below the other).
enum class TilePair : int { kNone = 0, kInput = 1, kWeight = 2 };

struct TileShape {
  int halves;  // times 64 rows for each warpgroup
  int columns;
  bool together;  // two warpgroups share a tile, of twice as many rows
  int rows() const { return 64 * halves * (together ? 2 : 1); }
};

// Each entry is a kernel: launch_linear_tiles lists them in this order.
constexpr TileShape kTileShapes[] = {{2, 112, false}, {2, 128, false}, {2, 160, false},
                                     {2, 192, false}, {2, 208, false}, {1, 192, true},
                                     {1, 256, true}};
constexpr int kNumTileShapes = sizeof(kTileShapes) / sizeof(kTileShapes[0]);
constexpr int kNumTiles = 3 * kNumTileShapes;  // tile / kNumTileShapes is what pairs share

// Tiles of 128 rows by 64 columns of linear_cluster.cuh follow, one for each shape of cluster.
struct ClusterShape {
  int ranks, sharers;
};
constexpr ClusterShape kClusterShapes[] = {{2, 4}, {4, 2}};
constexpr int kNumClusterShapes = sizeof(kClusterShapes) / sizeof(kClusterShapes[0]);

template <typename T>
cudaError_t launch_linear_cluster(const LinearArgs& args, ClusterShape shape, bool chained,
                                  cudaStream_t stream);

template <typename T>
cudaError_t launch_linear_tiles(const LinearArgs& args, int shape, TilePair pair,
                                cudaStream_t stream);

}  // namespace eet_patch::cuda
