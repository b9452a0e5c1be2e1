// Launching of linear_tiles.cuh for one element type.
#pragma once

#include <utility>

#include "cuda/linear_tiles.cuh"

namespace eet_patch::cuda {

template <typename T, int kShape>
cudaError_t launch_tile_shape(LinearTileParams<T> p, const LinearArgs& args, TilePair pair,
                              cudaStream_t stream) {
  constexpr TileShape kTile = kTileShapes[kShape];
  using Tile = LinearTile<kTile.halves, kTile.columns, kTile.together>;
  const int multiprocessors = std::max(1, device_attribute(cudaDevAttrMultiProcessorCount));
  p.row_blocks = static_cast<int>(ceil_div(args.rows, Tile::kRows));
  p.column_blocks = static_cast<int>(ceil_div(args.out_features, kTile.columns));
  const int columns = p.column_blocks * p.num_weights;
  if (pair == TilePair::kInput && columns == 1) pair = TilePair::kNone;
  if (pair == TilePair::kWeight && p.row_blocks == 1) pair = TilePair::kNone;
  p.pair = pair;
  const int ranks = pair == TilePair::kNone ? 1 : 2;
  const int64_t groups = int64_t(pair == TilePair::kInput ? ceil_div(columns, 2) : columns) *
                         (pair == TilePair::kWeight ? ceil_div(p.row_blocks, 2) : p.row_blocks);

  cudaError_t error = make_tensor_map(&p.input, args.input, args.rows, args.in_features,
                                      pair == TilePair::kInput ? Tile::kRows / 2 : Tile::kRows);
  for (int i = 0; i < p.num_weights && error == cudaSuccess; ++i) {
    error = make_tensor_map(p.weight + i, args.weight[i], args.out_features, args.in_features,
                            pair == TilePair::kWeight ? kTile.columns / 2 : kTile.columns);
  }
  if (error != cudaSuccess) return error;
  LaunchConfig config;
  config.stream = stream;
  config.chained = true;  // it waits for the kernel ahead before it reads or writes anything
  config.grid =
      dim3(static_cast<unsigned>(std::min<int64_t>(groups, multiprocessors / ranks) * ranks));
  config.block = dim3(kTileThreads);
  config.shared_bytes = Tile::kSharedBytes;
  config.cluster_size = ranks;
  return launch(config, linear_tile_kernel<T, kTile.halves, kTile.columns, kTile.together>, p);
}

template <typename T, int... kShapes>
cudaError_t launch_one_of(const LinearTileParams<T>& p, const LinearArgs& args, int shape,
                          TilePair pair, cudaStream_t stream,
                          std::integer_sequence<int, kShapes...>) {
  using Launch = cudaError_t (*)(LinearTileParams<T>, const LinearArgs&, TilePair, cudaStream_t);
  constexpr Launch kLaunches[] = {launch_tile_shape<T, kShapes>...};
  return kLaunches[shape](p, args, pair, stream);
}

template <typename T>
cudaError_t launch_linear_tiles(const LinearArgs& args, int shape, TilePair pair,
                                cudaStream_t stream) {
  return launch_one_of<T>(tile_params<T>(args), args, shape, pair, stream,
                          std::make_integer_sequence<int, kNumTileShapes>());
}

}  // namespace eet_patch::cuda
