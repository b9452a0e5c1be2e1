// Launching of linear_cluster.cuh.
#include "cuda/linear_cluster.cuh"

namespace eet_patch::cuda {
namespace {

// Of 227 KB a multiprocessor: two blocks fit.
constexpr int kHalfSharedBytes = 113 * 1024;

// What the kernel's mask of members and its place for received sums take for granted.
constexpr bool fits(ClusterShape shape) {
  return (shape.sharers == 2 || shape.sharers == 4) && shape.ranks >= 2 && 8 % shape.ranks == 0 &&
         shape.ranks * shape.sharers <= 8;
}
static_assert(fits(kClusterShapes[0]) && fits(kClusterShapes[1]) && kNumClusterShapes == 2);

}  // namespace

template <typename T>
cudaError_t launch_linear_cluster(const LinearArgs& args, ClusterShape shape, bool chained,
                                  cudaStream_t stream) {
  LinearTileParams<T> p = tile_params<T>(args);
  p.row_blocks = static_cast<int>(ceil_div(args.rows, kClusterRows));
  p.column_blocks = static_cast<int>(ceil_div(args.out_features, kClusterColumns));
  ClusterPlan plan = {};
  plan.ranks = shape.ranks;
  plan.sharers = shape.sharers;
  plan.weights_first = chained;
  if (!plan_cluster(&plan, p.k_blocks, kHalfSharedBytes)) return cudaErrorInvalidConfiguration;
  cudaError_t error = make_tensor_map(&p.input, args.input, args.rows, args.in_features,
                                      kClusterRows / shape.sharers);
  for (int i = 0; i < p.num_weights && error == cudaSuccess; ++i) {
    error = make_tensor_map(p.weight + i, args.weight[i], args.out_features, args.in_features,
                            kClusterColumns);
  }
  if (error != cudaSuccess) return error;
  const int64_t tiles =
      p.row_blocks * ceil_div(int64_t(p.column_blocks) * p.num_weights, int64_t(shape.sharers));
  LaunchConfig config;
  config.stream = stream;
  config.chained = true;  // it waits for the kernel ahead before it reads what that wrote
  config.grid = dim3(static_cast<unsigned>(tiles * shape.ranks * shape.sharers));
  config.block = dim3(kClusterThreads);
  config.shared_bytes = plan.shared_bytes;
  config.most_shared_bytes = kHalfSharedBytes;
  config.cluster_size = shape.ranks * shape.sharers;
  return launch(config, linear_cluster_kernel<T>, p, plan);
}

template cudaError_t launch_linear_cluster<__half>(const LinearArgs&, ClusterShape, bool,
                                                   cudaStream_t);
template cudaError_t launch_linear_cluster<__nv_bfloat16>(const LinearArgs&, ClusterShape, bool,
                                                          cudaStream_t);

}  // namespace eet_patch::cuda
