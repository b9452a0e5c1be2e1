// Products of few rows with a weight in place, in either order, up to three weights side by side,
// with layer norm before and bias, activation and residual after. fp16 and bf16 of aligned sizes go
// to the tensor core kernels of linear_stream.cuh and, before sm_90, linear_mma.cuh; fp32 (never
// TF32) and sizes that 16-byte loads cannot serve go to the two plain FMA kernels here.
#include <algorithm>

#include "cuda/launchers.h"
#include "cuda/linear_mma.cuh"
#include "cuda/linear_stream.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kRowBlock = 8;  // rows of the batch that share one pass over the weights
constexpr int kPlainWarps = 8;
constexpr int kInOutWarps = 16;
constexpr int kReservedShared = 2048;      // the driver's share of a block, and the static arrays
constexpr int kResidentBytes = 20 * 1024;  // of the input that a block with several tiles keeps

// (out, in) weights: a warp owns one output column and strides over k; the input comes through L1.
// Any sizes; kVector > 1 needs 16-byte aligned rows. Moves every weight once per kRowBlock rows.
template <typename T, int kVector>
__global__ void __launch_bounds__(kPlainWarps* kWarpSize)
    linear_out_in_kernel(const LinearParams<T> p) {
  __shared__ float means[kMaxSkinnyRows], scales[kMaxSkinnyRows];
  if (!p.release_late) release_dependents();
  wait_for_predecessor();
  if (p.release_late) release_dependents();
  const bool norm = p.norm_weight != nullptr;
  if (norm) {
    row_statistics<T, kVector>(p, means, scales, kPlainWarps);
    __syncthreads();
  }
  const int lane = threadIdx.x % kWarpSize;
  const int64_t column = int64_t(blockIdx.x) * kPlainWarps + threadIdx.x / kWarpSize;
  if (column >= int64_t(p.num_weights) * p.out_features) return;
  const int which = static_cast<int>(column / p.out_features),
            n = static_cast<int>(column % p.out_features);
  const T* weight = p.weight(which) + int64_t(n) * p.in_features;

  for (int first = 0; first < p.rows; first += kRowBlock) {
    const int rows = min(kRowBlock, p.rows - first);
    float sums[kRowBlock] = {};
#pragma unroll 2
    for (int k = lane * kVector; k < p.in_features; k += kWarpSize * kVector) {
      float w[kVector];
      load_vector(weight + k, w);
#pragma unroll
      for (int r = 0; r < kRowBlock; ++r) {
        if (r < rows) {
          float x[kVector];
          load_vector(p.input + (first + r) * p.input_stride + k, x);
          if (norm) {
            apply_norm(p, x, k, means[first + r], scales[first + r]);
#pragma unroll
            for (int i = 0; i < kVector; ++i) x[i] = to_float(from_float<T>(x[i]));
          }
#pragma unroll
          for (int i = 0; i < kVector; ++i) sums[r] = fmaf(x[i], w[i], sums[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowBlock; ++r) {
      if (r < rows) {
        const float sum = warp_sum(sums[r]);
        if (lane == r) finish_element(p, first + r, which, n, sum);
      }
    }
  }
}

// (in, out) weights: a block owns 32 columns, a lane one of them, and its 16 warps split k; partial
// sums meet in shared memory and are added in the order of the warps. Any sizes.
template <typename T>
__global__ void __launch_bounds__(kInOutWarps* kWarpSize)
    linear_in_out_kernel(const LinearParams<T> p) {
  __shared__ float means[kMaxSkinnyRows], scales[kMaxSkinnyRows];
  __shared__ float partial[kInOutWarps][kRowBlock][kWarpSize];
  if (!p.release_late) release_dependents();
  wait_for_predecessor();
  if (p.release_late) release_dependents();
  const bool norm = p.norm_weight != nullptr;
  if (norm) {
    row_statistics<T, 1>(p, means, scales, kInOutWarps);
    __syncthreads();
  }
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int tiles_per_weight = (p.out_features + kWarpSize - 1) / kWarpSize;
  const int which = blockIdx.x / tiles_per_weight,
            column = (blockIdx.x % tiles_per_weight) * kWarpSize;
  const int n = column + lane;
  const T* weight = p.weight(which) + min(n, p.out_features - 1);

  for (int first = 0; first < p.rows; first += kRowBlock) {
    const int rows = min(kRowBlock, p.rows - first);
    float sums[kRowBlock] = {};
#pragma unroll 4
    for (int k = warp; k < p.in_features; k += kInOutWarps) {
      const float w = to_float(weight[int64_t(k) * p.out_features]);
#pragma unroll
      for (int r = 0; r < kRowBlock; ++r) {
        if (r < rows) {
          float x[1] = {to_float(p.input[(first + r) * p.input_stride + k])};
          if (norm) {
            apply_norm(p, x, k, means[first + r], scales[first + r]);
            x[0] = to_float(from_float<T>(x[0]));
          }
          sums[r] = fmaf(x[0], w, sums[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowBlock; ++r) partial[warp][r][lane] = sums[r];
    __syncthreads();
    if (warp < rows && n < p.out_features) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kInOutWarps; ++w) sum += partial[w][warp][lane];
      finish_element(p, first + warp, which, n, sum);
    }
    __syncthreads();
  }
}

bool has_bulk_copies() { return kernel_capability() >= 9; }

// How the tiles of a product are spread over the chip.
struct StreamPlan {
  int ranks, rank_chunks;  // K is split over `ranks` blocks, `rank_chunks` chunks each
  int block_tiles, blocks, ring_stages;
};

// Bytes move while every multiprocessor has blocks to itself, and as many as the others. One block
// each serves where its weights fit its ring whole, so that nothing is left to load when the input
// comes; else two, whose rings leave room for those of the next product, or three if they spread
// more evenly (kShare: what as many are worth, chosen after timings of two and of three blocks at
// GPT-2's sizes on an H100).
template <int kRows>
StreamPlan plan_stream(int tiles, int chunks, int multiprocessors) {
  constexpr int kSharedStages = 5, kMaxBlocks = kRows <= 16 ? 3 : 2;
  constexpr float kShare[] = {0.0f, 0.8f, 1.0f, 0.93f};
  auto split = [&](int ranks, int block_tiles) {
    StreamPlan plan;
    plan.rank_chunks = static_cast<int>(ceil_div(chunks, ranks));
    plan.ranks = static_cast<int>(ceil_div(chunks, plan.rank_chunks));
    plan.block_tiles = block_tiles;
    plan.blocks = static_cast<int>(ceil_div(tiles, block_tiles)) * plan.ranks;
    plan.ring_stages = kSharedStages;
    return plan;
  };
  if (kRows <= 8 && tiles <= multiprocessors) {
    StreamPlan plan = split(std::min({kMaxClusterSize, multiprocessors / tiles, chunks}), 1);
    plan.ring_stages = StreamTile<kRows>::kMaxStages;
    if (plan.rank_chunks <= plan.ring_stages) return plan;
  }
  StreamPlan best = {};
  float best_share = 0.0f;
  auto consider = [&](const StreamPlan& plan) {
    const int each = static_cast<int>(ceil_div(plan.blocks, multiprocessors));
    if (each > kMaxBlocks) return;
    const float even = float(plan.blocks) / float(each * multiprocessors) * float(chunks) /
                       float(plan.ranks * plan.rank_chunks) * float(tiles) /
                       float(plan.blocks / plan.ranks * plan.block_tiles);
    const float share = even * kShare[each];
    if (share > best_share) best = plan, best_share = share;
  };
  for (int ranks = 1; ranks <= std::min(kMaxClusterSize, chunks); ++ranks)
    consider(split(ranks, 1));
  for (int each = 1; each <= kMaxBlocks; ++each)
    consider(split(1, static_cast<int>(ceil_div(tiles, int64_t(each) * multiprocessors))));
  return best;
}

template <typename T, int kRows, bool kInOut, bool kPostNorm>
cudaError_t launch_stream(const LinearParams<T>& p, LaunchConfig config) {
  using Tile = StreamTile<kRows>;
  const int multiprocessors = std::max(1, device_attribute(cudaDevAttrMultiProcessorCount));
  const int tiles = static_cast<int>(ceil_div(p.out_features, kNormTile)) * p.num_weights;
  const int chunks = static_cast<int>(ceil_div(p.in_features, Tile::kChunkK));
  const StreamPlan plan = plan_stream<kRows>(tiles, chunks, multiprocessors);
  const int parts = static_cast<int>(ceil_div(plan.rank_chunks, Tile::kPartChunks));
  const bool stays = plan.block_tiles > 1 && parts * Tile::panel_bytes(p.rows) <= kResidentBytes;
  const int panels = stays ? parts : std::min(parts, Tile::kPanels);
  const int stages = static_cast<int>(
      std::min<int64_t>(int64_t(plan.rank_chunks) * plan.block_tiles, plan.ring_stages));

  LinearMaps maps = {};
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < p.num_weights && error == cudaSuccess; ++i) {
    error = make_tensor_map(maps.weight + i, p.weight(i), kInOut ? p.in_features : p.out_features,
                            kInOut ? p.out_features : p.in_features,
                            kInOut ? Tile::kChunkK : kNormTile);
  }
  if (error != cudaSuccess) return error;
  config.shared_bytes = stages * Tile::kChunkBytes + panels * Tile::panel_bytes(p.rows) +
                        Tile::sum_bytes(p.rows, plan.ranks) + Tile::kSmallBytes;
  config.grid = dim3(static_cast<unsigned>(plan.blocks));
  config.block = dim3(kStreamThreads);
  config.cluster_size = plan.ranks;
  return launch(config, linear_stream_kernel<T, kRows, kInOut, kPostNorm>, p, maps, panels,
                plan.rank_chunks * Tile::kChunkK, stages);
}

template <typename T, int kRows, bool kInOut>
cudaError_t launch_mma(const LinearParams<T>& p, LaunchConfig config) {
  using Tile = MmaTile<kRows, kInOut>;
  constexpr int kUnitK = Tile::kUnitSteps * Tile::kStepK;
  const int multiprocessors = std::max(1, device_attribute(cudaDevAttrMultiProcessorCount));
  const int max_shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int tiles = static_cast<int>(ceil_div(p.out_features, Tile::kColumns)) * p.num_weights;
  const int64_t row_bytes = (max_shared - kReservedShared - Tile::kSumBytes) / p.rows;
  const int64_t fitting = (row_bytes / int64_t(sizeof(T)) - Tile::kPad) / kUnitK * kUnitK;
  if (fitting < kUnitK) return cudaErrorInvalidConfiguration;
  const int panel_k = static_cast<int>(std::min<int64_t>(round_up(p.in_features, kUnitK), fitting));
  config.shared_bytes =
      round_up(int64_t(p.rows) * (panel_k + Tile::kPad) * int64_t(sizeof(T)), 16) + Tile::kSumBytes;
  const int64_t multiprocessor_bytes =
      device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const bool two =
      kRows <= 16 && 2 * int64_t(config.shared_bytes + kReservedShared) <= multiprocessor_bytes;
  const int resident = (two ? 2 : 1) * multiprocessors;  // blocks at a time; each walks its tiles
  config.grid = dim3(static_cast<unsigned>(std::min(tiles, resident)));
  config.block = dim3(kMmaThreads);
  return launch(config, linear_mma_kernel<T, kRows, kInOut>, p, panel_k);
}

template <typename T, int kRows, bool kInOut>
cudaError_t launch_tensor_cores(const LinearParams<T>& p, const LaunchConfig& config) {
  if (!has_bulk_copies()) return launch_mma<T, kRows, kInOut>(p, config);
  if constexpr (!kInOut) {
    if (p.residual_norm_weight != nullptr) return launch_stream<T, kRows, kInOut, true>(p, config);
  }
  return launch_stream<T, kRows, kInOut, false>(p, config);
}

template <typename T, bool kInOut>
cudaError_t launch_tensor_cores(const LinearParams<T>& p, const LaunchConfig& config) {
  if (p.rows <= 8) return launch_tensor_cores<T, 8, kInOut>(p, config);
  if (p.rows <= 16) return launch_tensor_cores<T, 16, kInOut>(p, config);
  if (p.rows <= 32) return launch_tensor_cores<T, 32, kInOut>(p, config);
  return launch_tensor_cores<T, 64, kInOut>(p, config);
}

bool takes_tensor_cores(const LinearArgs& args) {
  constexpr int64_t kVector = 8;
  if (args.dtype == DType::kFloat32) return false;
  bool aligned =
      is_aligned(args.input) && is_aligned(args.norm_weight) && is_aligned(args.norm_bias);
  for (int i = 0; i < args.num_weights; ++i) aligned = aligned && is_aligned(args.weight[i]);
  return aligned && args.in_features > 0 && args.in_features % kVector == 0 &&
         args.input_stride % kVector == 0 && (!args.in_out || args.out_features % kVector == 0);
}

bool is_even(int64_t value) { return value % 2 == 0; }
bool is_pair_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 4 == 0; }

}  // namespace

bool linear_takes_partials(const LinearArgs& args) {
  return args.num_weights == 1 && takes_tensor_cores(args) && has_bulk_copies();
}

bool linear_takes_residual_norm(const LinearArgs& args) {
  return linear_takes_partials(args) && !args.in_out && args.norm_weight == nullptr;
}

int64_t norm_tiles(int64_t features) { return ceil_div(features, kNormTile); }

template <typename T>
cudaError_t launch_linear(const LinearArgs& args, cudaStream_t stream, const LinearChain& chain) {
  if (args.rows == 0 || args.out_features == 0 || args.num_weights == 0) return cudaSuccess;
  LinearParams<T> p = {};
  p.out = static_cast<T*>(args.out);
  p.input = static_cast<const T*>(args.input);
  const T* weights[3];
  const T* biases[3];
  p.pairs = is_even(args.out_features) && is_even(args.out_stride) && is_pair_aligned(args.out) &&
            is_pair_aligned(args.residual) && is_pair_aligned(chain.residual_norm_weight) &&
            is_pair_aligned(chain.residual_norm_bias);
  for (int i = 0; i < 3; ++i) {
    const int from = i < args.num_weights ? i : 0;
    weights[i] = static_cast<const T*>(args.weight[from]);
    biases[i] = static_cast<const T*>(args.bias[from]);
    p.pairs = p.pairs && is_pair_aligned(biases[i]);
  }
  p.weight0 = weights[0], p.weight1 = weights[1], p.weight2 = weights[2];
  p.bias0 = biases[0], p.bias1 = biases[1], p.bias2 = biases[2];
  p.residual = static_cast<const T*>(args.residual);
  p.norm_weight = static_cast<const T*>(args.norm_weight);
  p.norm_bias = static_cast<const T*>(args.norm_bias);
  p.residual_norm_weight = static_cast<const T*>(chain.residual_norm_weight);
  p.residual_norm_bias = static_cast<const T*>(chain.residual_norm_bias);
  p.residual_partials = chain.residual_partials;
  p.norm_partials = chain.norm_partials;
  p.out_partials = chain.out_partials;
  p.input_stride = args.input_stride;
  p.out_stride = args.out_stride;
  p.rows = static_cast<int>(args.rows);
  p.in_features = static_cast<int>(args.in_features);
  p.out_features = static_cast<int>(args.out_features);
  p.num_weights = args.num_weights;
  p.norm_eps = args.norm_eps;
  p.activation = args.activation;
  p.release_late = chain.release_late;

  LaunchConfig config;
  config.stream = stream;
  config.chained = chain.chained;
  if constexpr (sizeof(T) == 2) {
    if (takes_tensor_cores(args)) {
      return args.in_out ? launch_tensor_cores<T, true>(p, config)
                         : launch_tensor_cores<T, false>(p, config);
    }
  }
  if (args.in_out) {
    config.grid =
        dim3(static_cast<unsigned>(ceil_div(args.out_features, kWarpSize) * args.num_weights));
    config.block = dim3(kInOutWarps * kWarpSize);
    return launch(config, linear_in_out_kernel<T>, p);
  }
  config.grid =
      dim3(static_cast<unsigned>(ceil_div(args.out_features * args.num_weights, kPlainWarps)));
  config.block = dim3(kPlainWarps * kWarpSize);
  if constexpr (sizeof(T) == 4) {
    constexpr int kVector = kVectorSize<T>;
    bool aligned = is_aligned(args.input) && is_aligned(args.norm_weight) &&
                   is_aligned(args.norm_bias) && args.in_features % kVector == 0 &&
                   args.input_stride % kVector == 0;
    for (const T* weight : weights) aligned = aligned && is_aligned(weight);
    if (aligned) return launch(config, linear_out_in_kernel<T, kVector>, p);
  }
  return launch(config, linear_out_in_kernel<T, 1>, p);
}

template cudaError_t launch_linear<float>(const LinearArgs&, cudaStream_t, const LinearChain&);
template cudaError_t launch_linear<__half>(const LinearArgs&, cudaStream_t, const LinearChain&);
template cudaError_t launch_linear<__nv_bfloat16>(const LinearArgs&, cudaStream_t,
                                                  const LinearChain&);

Status linear(const LinearArgs& args, const Context& context) {
  if (args.rows > kMaxSkinnyRows) return Status{Status::kUnsupported};
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_linear<decltype(element)>(args, stream_of(context), LinearChain());
  }));
}

}  // namespace eet_patch::cuda
