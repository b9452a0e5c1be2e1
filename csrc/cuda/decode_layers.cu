// The layers of one decode step as a chain of launches, five a layer, each able to start before the
// one ahead of it ends: layer norm + q/k/v product, attention with the new key and value written to
// the cache, output product + residual, layer norm + first product + activation, second product +
// residual; the head behind the last one is a link of the same chain. Everything that changes from
// step to step is read from device memory, so that the chain can be captured once and replayed.
#include <algorithm>

#include "common/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/step_attention.cuh"
#include "cuda/step_attention_mma.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 4;  // of the attention
constexpr int kMinSplitKeys = 64;

struct Workspace {  // offsets in bytes; the q/k/v rows stand at 0
  int64_t context, middle, inner, middle_partials, out_partials, end;
};

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

Workspace workspace_parts(const DecodeLayersArgs& args) {
  const int64_t hidden_size = args.num_heads * args.head_dim;
  const int64_t bytes = args.rows * element_size(args.dtype);
  const int64_t partials =
      workspace_part(args.rows * norm_tiles(hidden_size) * int64_t(sizeof(float2)));
  Workspace parts = {};
  parts.context = workspace_part(3 * hidden_size * bytes);
  parts.middle = parts.context + workspace_part(hidden_size * bytes);
  parts.inner = parts.middle + workspace_part(hidden_size * bytes);
  parts.middle_partials = parts.inner + workspace_part(args.intermediate_size * bytes);
  parts.out_partials = parts.middle_partials + partials;
  parts.end = parts.out_partials + partials;
  return parts;
}

template <typename T>
cudaError_t launch_step_attention(void (*kernel)(StepAttentionParams<T>), int shared_bytes,
                                  const StepAttentionParams<T>& p, const DecodeLayersArgs& args,
                                  cudaStream_t stream) {
  LaunchConfig config;
  config.stream = stream;
  config.chained = true;
  config.block = dim3(kStepThreads);
  config.cluster_size = attention_splits(args);
  config.grid = dim3(static_cast<unsigned>(config.cluster_size),
                     static_cast<unsigned>(args.num_heads), static_cast<unsigned>(args.rows));
  config.shared_bytes = static_cast<size_t>(shared_bytes);
  return launch(config, kernel, p);
}

template <typename T, int kLanes, int kPieces>
cudaError_t launch_step_attention(const StepAttentionParams<T>& p, const DecodeLayersArgs& args,
                                  cudaStream_t stream) {
  using Tile = StepAttentionTile<T, kLanes, kPieces>;
  return launch_step_attention(step_attention_kernel<T, kLanes, kPieces>,
                               Tile::kStages * Tile::kStageBytes, p, args, stream);
}

template <typename T, int kSteps>
cudaError_t launch_step_attention_mma(const StepAttentionParams<T>& p, const DecodeLayersArgs& args,
                                      cudaStream_t stream) {
  return launch_step_attention(step_attention_mma_kernel<T, kSteps>,
                               StepMmaTile<kSteps>::kRingBytes, p, args, stream);
}

template <typename T>
cudaError_t launch_step_attention(const StepAttentionParams<T>& p, const DecodeLayersArgs& args,
                                  cudaStream_t stream) {
  // Many heads and rows keep the memory busy whatever the instructions; a wide head needs more
  // shared memory than the tensor core kernel can have ahead (both measured on an H200).
  constexpr int kFewBlocksSplits = 4;
  if constexpr (sizeof(T) == 2) {
    if (p.vectors && p.head_dim <= 80 && attention_splits(args) >= kFewBlocksSplits) {
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

LinearArgs product(const DecodeLayersArgs& args, void* out, const void* input, int64_t in_features,
                   int64_t out_features) {
  LinearArgs linear = {};
  linear.out = out;
  linear.input = input;
  linear.rows = args.rows;
  linear.in_features = linear.input_stride = in_features;
  linear.out_features = linear.out_stride = out_features;
  linear.num_weights = 1;
  linear.in_out = args.in_out;
  linear.norm_eps = args.norm_eps;
  linear.dtype = args.dtype;
  return linear;
}

template <typename T>
cudaError_t launch_decode_layers(const DecodeLayersArgs& args, cudaStream_t stream) {
  const Workspace parts = workspace_parts(args);
  if (args.workspace == nullptr || args.workspace_bytes < parts.end) return cudaErrorInvalidValue;
  const int64_t hidden_size = args.num_heads * args.head_dim;
  char* workspace = static_cast<char*>(args.workspace);
  StepAttentionParams<T> attention = {};
  attention.out = reinterpret_cast<T*>(workspace + parts.context);
  attention.qkv = reinterpret_cast<const T*>(workspace);
  attention.lengths = args.lengths;
  attention.kv_start = args.kv_start;
  attention.cache_rows = args.cache_rows;
  attention.key_rows = args.key_rows;
  attention.strides = args.cache_strides;
  attention.capacity = args.capacity;
  attention.num_heads = static_cast<int>(args.num_heads);
  attention.head_dim = static_cast<int>(args.head_dim);
  const bool even_strides = args.head_dim % kVectorSize<T> == 0 &&
                            args.cache_strides.batch % kVectorSize<T> == 0 &&
                            args.cache_strides.head % kVectorSize<T> == 0 &&
                            args.cache_strides.token % kVectorSize<T> == 0;

  cudaError_t error = cudaSuccess;
  const void* hidden_states = args.hidden_states;
  const float2* out_partials = nullptr;  // of hidden_states
  for (int64_t index = 0; index < args.num_layers && error == cudaSuccess; ++index) {
    const DecodeLayer& layer = args.layers[index];
    LinearArgs qkv = product(args, workspace, hidden_states, hidden_size,
                             args.num_qkv_weights == 1 ? 3 * hidden_size : hidden_size);
    qkv.out_stride = 3 * hidden_size;
    qkv.num_weights = args.num_qkv_weights;
    for (int i = 0; i < args.num_qkv_weights; ++i) {
      qkv.weight[i] = layer.qkv_weight[i];
      qkv.bias[i] = layer.qkv_bias[i];
    }
    qkv.norm_weight = layer.norm1_weight;
    qkv.norm_bias = layer.norm1_bias;
    LinearChain chain;
    chain.chained = index > 0 || args.chained;
    chain.release_late = true;  // attention reads its past ahead
    chain.norm_partials = out_partials;
    error = launch_linear<T>(qkv, stream, chain);

    attention.key_cache = static_cast<T*>(layer.key_cache);
    attention.value_cache = static_cast<T*>(layer.value_cache);
    attention.vectors =
        even_strides && is_aligned(layer.key_cache) && is_aligned(layer.value_cache);
    attention.scale = static_cast<float>(layer.softmax_scale) * kLog2E;
    if (error == cudaSuccess) error = launch_step_attention(attention, args, stream);

    LinearArgs projection =
        product(args, workspace + parts.middle, attention.out, hidden_size, hidden_size);
    projection.weight[0] = layer.out_weight;
    projection.bias[0] = layer.out_bias;
    projection.residual = hidden_states;
    float2* middle_partials = linear_takes_partials(projection)
                                  ? reinterpret_cast<float2*>(workspace + parts.middle_partials)
                                  : nullptr;
    chain = {true, false, nullptr, middle_partials};
    if (error == cudaSuccess) error = launch_linear<T>(projection, stream, chain);

    LinearArgs first =
        product(args, workspace + parts.inner, projection.out, hidden_size, args.intermediate_size);
    first.weight[0] = layer.fc1_weight;
    first.bias[0] = layer.fc1_bias;
    first.norm_weight = layer.norm2_weight;
    first.norm_bias = layer.norm2_bias;
    first.activation = args.activation;
    chain = {true, false, middle_partials, nullptr};
    if (error == cudaSuccess) error = launch_linear<T>(first, stream, chain);

    LinearArgs second = product(args, args.out, first.out, args.intermediate_size, hidden_size);
    second.weight[0] = layer.fc2_weight;
    second.bias[0] = layer.fc2_bias;
    second.residual = projection.out;
    float2* partials = linear_takes_partials(second)
                           ? reinterpret_cast<float2*>(workspace + parts.out_partials)
                           : nullptr;
    chain = {true, false, nullptr, partials};
    if (error == cudaSuccess) error = launch_linear<T>(second, stream, chain);
    hidden_states = args.out;
    out_partials = partials;
  }
  if (args.head_weight == nullptr || error != cudaSuccess) return error;
  LinearArgs head = product(args, args.logits, hidden_states, hidden_size, args.vocab_size);
  head.in_out = false;
  head.weight[0] = args.head_weight;
  head.norm_weight = args.head_norm_weight;
  head.norm_bias = args.head_norm_bias;
  LinearChain chain;
  chain.chained = args.num_layers > 0 || args.chained;
  chain.norm_partials = linear_takes_partials(head) ? out_partials : nullptr;
  return launch_linear<T>(head, stream, chain);
}

}  // namespace

int64_t decode_layers_workspace_bytes(const DecodeLayersArgs& args) {
  return workspace_parts(args).end;
}

Status decode_layers(const DecodeLayersArgs& args, const Context& context) {
  constexpr int64_t kMaxHeadDim = 256;
  if (args.rows > kMaxSkinnyRows || args.head_dim > kMaxHeadDim)
    return Status{Status::kUnsupported};
  if (args.rows == 0) return Status{};
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_decode_layers<decltype(element)>(args, stream_of(context));
  }));
}

}  // namespace eet_patch::cuda
