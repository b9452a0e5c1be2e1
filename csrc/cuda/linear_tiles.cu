// Products of many rows: which of them there are kernels for, and their launch.
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/linear_tiles.h"

namespace eet_patch::cuda {
namespace {

bool is_supported(const LinearArgs& args) {
  constexpr int64_t kVector = 8, kMost = int64_t(1) << 30;
  if (args.dtype == DType::kFloat32 || args.in_out || args.norm_weight != nullptr) return false;
  if (args.activation != Activation::kNone && args.residual != nullptr) return false;
  if (args.in_features <= 0 || args.in_features % kVector != 0 ||
      args.input_stride != args.in_features || args.out_features % kVector != 0 ||
      args.out_stride % kVector != 0)
    return false;
  if (args.rows > kMost || args.in_features > kMost || args.out_features > kMost) return false;
  bool aligned = is_aligned(args.out) && is_aligned(args.input) && is_aligned(args.residual);
  for (int i = 0; i < args.num_weights; ++i)
    aligned = aligned && is_aligned(args.weight[i]) && is_aligned(args.bias[i]);
  return aligned && has_warpgroup_products();
}

}  // namespace

Status linear_tiles(const LinearTilesArgs& args, const Context& context) {
  const LinearArgs& product = args.product;
  if (!is_supported(product) || args.tile < 0 || args.tile >= kNumTiles + kNumClusterShapes)
    return Status{Status::kUnsupported};
  if (product.rows == 0 || product.out_features == 0) return Status{};
  const int tile = args.tile;
  const cudaStream_t stream = stream_of(context);
  const bool half = product.dtype == DType::kFloat16;
  if (tile >= kNumTiles) {
    const ClusterShape shape = kClusterShapes[tile - kNumTiles];
    return to_status(
        half ? launch_linear_cluster<__half>(product, shape, args.chained, stream)
             : launch_linear_cluster<__nv_bfloat16>(product, shape, args.chained, stream));
  }
  const int shape = tile % kNumTileShapes;
  const TilePair pair = static_cast<TilePair>(tile / kNumTileShapes);
  return to_status(half ? launch_linear_tiles<__half>(product, shape, pair, stream)
                        : launch_linear_tiles<__nv_bfloat16>(product, shape, pair, stream));
}

}  // namespace eet_patch::cuda
