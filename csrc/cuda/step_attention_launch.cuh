// Which kernel serves the attention of a decode step, and how many blocks.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "cuda/step_attention.cuh"
#include "cuda/step_attention_beams.cuh"
#include "cuda/step_attention_mma.cuh"
#include "cuda/step_weights.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 4;  // of the attention
constexpr int kMinSplitKeys = 64;

// One block a head is as many as chips without clusters get.
int attention_splits(const DecodeLayersArgs& args) {
  if (kernel_capability() < 9) return 1;
  const int64_t pairs = std::max<int64_t>(1, args.rows * args.num_heads);
  const int64_t blocks =
      int64_t(kBlocksPerMultiprocessor) * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t splits = std::min(
      {int64_t(kMaxClusterSize), blocks / pairs, ceil_div(args.max_kv_len, kMinSplitKeys)});
  return static_cast<int>(std::max<int64_t>(1, splits));
}

// A block a head keeps four warps busy with a handful of keys each, and about six such blocks fit a
// multiprocessor: with twice as many heads a warp a head is enough. Where keys are shared by rows,
// a warp of tensor cores for all rows of a sentence reads them once, but takes longer over its own
// few. On an H100, 16 heads over some 30 keys, in us: 160 rows a warp a head 7.6, by
// sentences 10.3; 640 rows 24 and 18 (benchmarks/results/decode_steps_nvidia_h100_80gb_hbm3.txt).
constexpr int64_t kWarpHeads = 12, kBeamHeads = 32;  // of a multiprocessor

bool has_heads(const DecodeLayersArgs& args, int64_t of_a_multiprocessor) {
  return args.rows * args.num_heads >
         of_a_multiprocessor * device_attribute(cudaDevAttrMultiProcessorCount);
}

template <typename T>
cudaError_t launch_step_attention(void (*kernel)(StepAttentionParams<T>), int shared_bytes,
                                  int block_heads, const StepAttentionParams<T>& p,
                                  const DecodeLayersArgs& args, cudaStream_t stream) {
  LaunchConfig config;
  config.stream = stream;
  config.chained = !p.starts_alone;
  config.block = dim3(kStepThreads);
  config.cluster_size = attention_splits(args);
  config.grid = dim3(static_cast<unsigned>(config.cluster_size),
                     static_cast<unsigned>(ceil_div(args.num_heads, block_heads)),
                     static_cast<unsigned>(args.rows));
  config.shared_bytes = static_cast<size_t>(shared_bytes);
  return launch(config, kernel, p);
}

template <typename T, int kLanes, int kPieces>
cudaError_t launch_step_attention(const StepAttentionParams<T>& p, const DecodeLayersArgs& args,
                                  cudaStream_t stream) {
  using Tile = StepAttentionTile<T, kLanes, kPieces>;
  constexpr int kBytes = Tile::kStages * Tile::kStageBytes;  // a warp's share is always the same
  if (has_heads(args, kWarpHeads)) {
    return launch_step_attention(step_attention_kernel<T, kLanes, kPieces, 1>, kBytes, kStepWarps,
                                 p, args, stream);
  }
  return launch_step_attention(step_attention_kernel<T, kLanes, kPieces, kStepWarps>, kBytes, 1, p,
                               args, stream);
}

template <typename T, int kSteps>
cudaError_t launch_step_attention_mma(const StepAttentionParams<T>& p, const DecodeLayersArgs& args,
                                      cudaStream_t stream) {
  return launch_step_attention(step_attention_mma_kernel<T, kSteps>,
                               StepMmaTile<kSteps>::kRingBytes, 1, p, args, stream);
}

template <typename T, int kSteps>
cudaError_t launch_step_attention_beams(const StepAttentionParams<T>& p,
                                        const DecodeLayersArgs& args, cudaStream_t stream) {
  LaunchConfig config;
  config.stream = stream;
  config.chained = !p.starts_alone;
  config.block = dim3(kStepThreads);
  config.grid = dim3(static_cast<unsigned>(ceil_div(p.shared_rows, kBeamRows)),
                     static_cast<unsigned>(ceil_div(args.num_heads, kStepWarps)),
                     static_cast<unsigned>(args.rows / p.shared_rows));
  config.shared_bytes = StepBeamsTile<kSteps>::kRingBytes;
  return launch(config, step_attention_beams_kernel<T, kSteps>, p);
}

template <typename T>
cudaError_t launch_step_attention(const StepAttentionParams<T>& p, const DecodeLayersArgs& args,
                                  cudaStream_t stream) {
  // Many heads and rows keep the memory busy whatever the instructions; a wide head needs more
  // shared memory than the tensor core kernel can have ahead (both measured on an H200). Between
  // 64 and 80 the keys of a head are no whole lines, and tensor cores win anyway: 16 rows of 32
  // heads of 80 over 770 keys took 47.9 us for 53.2 on an H100, of 25 heads of 64 33.8 for 29.9.
  constexpr int kFewBlocksSplits = 4;
  if constexpr (sizeof(T) == 2) {
    if (p.shared_rows > 1 && p.vectors && p.head_dim <= 80 && kernel_capability() >= 8 &&
        has_heads(args, kBeamHeads)) {
      if (p.head_dim <= 32) return launch_step_attention_beams<T, 2>(p, args, stream);
      if (p.head_dim <= 64) return launch_step_attention_beams<T, 4>(p, args, stream);
      return launch_step_attention_beams<T, 5>(p, args, stream);
    }
    if (p.vectors && p.head_dim <= 80 &&
        (attention_splits(args) >= kFewBlocksSplits ||
         (p.head_dim > 64 && kernel_capability() >= 9 && !has_heads(args, kWarpHeads)))) {
      if (p.head_dim <= 32) return launch_step_attention_mma<T, 2>(p, args, stream);
      if (p.head_dim <= 64) return launch_step_attention_mma<T, 4>(p, args, stream);
      return launch_step_attention_mma<T, 5>(p, args, stream);
    }
  }
  constexpr int kWide = sizeof(T) == 4 ? 2 : 1;  // fp32 keys take twice the lanes
  if (p.head_dim <= 32) return launch_step_attention<T, 4 * kWide, 1>(p, args, stream);
  if (p.head_dim <= 64) return launch_step_attention<T, 8 * kWide, 1>(p, args, stream);
  if (p.head_dim <= 80) return launch_step_attention<T, 2 * kWide, 5>(p, args, stream);
  if (p.head_dim <= 96) return launch_step_attention<T, 4 * kWide, 3>(p, args, stream);
  if (p.head_dim <= 128) return launch_step_attention<T, 16 * kWide, 1>(p, args, stream);
  if (p.head_dim <= 192) return launch_step_attention<T, 8 * kWide, 3>(p, args, stream);
  return launch_step_attention<T, 32, kWide>(p, args, stream);
}

template <typename T>
bool takes_vectors(const HeadStrides& strides, int64_t head_dim, const void* keys,
                   const void* values) {
  return head_dim % kVectorSize<T> == 0 && strides.batch % kVectorSize<T> == 0 &&
         strides.head % kVectorSize<T> == 0 && strides.token % kVectorSize<T> == 0 &&
         is_aligned(keys) && is_aligned(values);
}

// `chained`: the launch ahead is of the same call and makes the queries. It must release its
// dependents late where what it or a launch before it wrote to a cache is read.
template <typename T>
cudaError_t launch_step_attention(const StepAttentionArgs& args, cudaStream_t stream,
                                  bool chained) {
  StepAttentionParams<T> p = {};
  p.out = static_cast<T*>(args.out);
  p.qkv = static_cast<const T*>(args.query);
  p.query_stride = args.query_stride;
  p.key_offset = args.key_offset;
  p.value_offset = args.value_offset;
  p.past_only = !args.appends;
  p.starts_alone = !chained;
  p.key_cache = static_cast<T*>(args.key_cache);
  p.value_cache = static_cast<T*>(args.value_cache);
  p.lengths = args.lengths;
  p.kv_start = args.kv_start;
  p.cache_rows = args.cache_rows;
  p.key_rows = args.key_rows;
  p.strides = args.cache_strides;
  p.capacity = args.capacity;
  p.num_heads = static_cast<int>(args.num_heads);
  p.head_dim = static_cast<int>(args.head_dim);
  p.shared_rows = static_cast<int>(args.shared_rows);
  p.scale = args.softmax_scale * kLog2E;
  p.vectors =
      takes_vectors<T>(args.cache_strides, args.head_dim, args.key_cache, args.value_cache) &&
      args.query_stride % kVectorSize<T> == 0 && args.key_offset % kVectorSize<T> == 0 &&
      args.value_offset % kVectorSize<T> == 0 && is_aligned(args.query) && is_aligned(args.out);
  DecodeLayersArgs sizes = {};
  sizes.rows = args.rows;
  sizes.num_heads = args.num_heads;
  sizes.head_dim = args.head_dim;
  sizes.max_kv_len = args.max_kv_len;
  const cudaError_t error = launch_step_attention(p, sizes, stream);
  if (error != cudaSuccess || args.weights == nullptr) return error;
  return launch_step_weights<T>(args, p.vectors, stream, true);
}

}  // namespace
}  // namespace eet_patch::cuda
