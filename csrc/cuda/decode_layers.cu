// The layers of one decode step as a chain of launches, five a layer, each able to start before the
// one ahead of it ends: layer norm + q/k/v product, attention with the new key and value written to
// the cache, output product + residual, layer norm + first product + activation, second product +
// residual; the head behind the last one is a link of the same chain. Post-norm layers have a
// launch for each norm, cross-attention three launches more. Everything that changes from step to
// step is read from device memory, so that the chain can be captured once and replayed.
#include <algorithm>

#include "common/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/step_attention.cuh"
#include "cuda/step_attention_mma.cuh"
#include "cuda/step_weights.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 4;  // of the attention
constexpr int kMinSplitKeys = 64;

struct Workspace {  // offsets in bytes; the q/k/v rows stand at 0
  int64_t context, middle, inner, middle_partials, out_partials, cross, cross_partials, end;
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
  parts.cross = parts.cross_partials = parts.end = parts.out_partials + partials;
  if (args.layers[0].cross_keys != nullptr) {
    parts.cross_partials = parts.cross + workspace_part(hidden_size * bytes);
    parts.end = parts.cross_partials + partials;
  }
  return parts;
}

template <typename T>
cudaError_t launch_step_attention(void (*kernel)(StepAttentionParams<T>), int shared_bytes,
                                  const StepAttentionParams<T>& p, const DecodeLayersArgs& args,
                                  cudaStream_t stream) {
  LaunchConfig config;
  config.stream = stream;
  config.chained = !p.starts_alone;
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
  p.part_stride = args.part_stride;
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
  p.scale = args.softmax_scale * kLog2E;
  p.vectors =
      takes_vectors<T>(args.cache_strides, args.head_dim, args.key_cache, args.value_cache) &&
      args.query_stride % kVectorSize<T> == 0 && args.part_stride % kVectorSize<T> == 0 &&
      is_aligned(args.query);
  DecodeLayersArgs sizes = {};
  sizes.rows = args.rows;
  sizes.num_heads = args.num_heads;
  sizes.head_dim = args.head_dim;
  sizes.max_kv_len = args.max_kv_len;
  const cudaError_t error = launch_step_attention(p, sizes, stream);
  if (error != cudaSuccess || args.weights == nullptr) return error;
  return launch_step_weights<T>(args, p.vectors, stream, true);
}

// Both norms of a layer that normalises after its residuals, in place.
template <typename T>
cudaError_t launch_post_norm(const DecodeLayersArgs& args, void* hidden_states, const void* weight,
                             const void* bias, cudaStream_t stream) {
  BiasResidualLayerNormArgs norm = {};
  norm.out = hidden_states;
  norm.input = hidden_states;
  norm.weight = weight;
  norm.norm_bias = bias;
  norm.rows = args.rows;
  norm.hidden_size = args.num_heads * args.head_dim;
  norm.eps = args.norm_eps;
  norm.dtype = args.dtype;
  return launch_layernorm<T>(norm, stream, true);
}

// Cross-attention from `middle` to `out`; the query and the context go where the layer's own were.
template <typename T>
cudaError_t launch_cross_attention(const DecodeLayersArgs& args, const DecodeLayer& layer,
                                   char* workspace, const Workspace& parts, void* middle, void* out,
                                   const float2* middle_partials, float2** out_partials,
                                   cudaStream_t stream) {
  const int64_t hidden_size = args.num_heads * args.head_dim;
  LinearArgs query = product(args, workspace, middle, hidden_size, hidden_size);
  query.weight[0] = layer.cross_query_weight;
  query.bias[0] = layer.cross_query_bias;
  if (!args.post_norm) {
    query.norm_weight = layer.cross_norm_weight;
    query.norm_bias = layer.cross_norm_bias;
  }
  LinearChain chain = {true, false, middle_partials, nullptr};
  cudaError_t error = launch_linear<T>(query, stream, chain);

  StepAttentionArgs step = {};
  step.out = workspace + parts.context;
  step.query = workspace;
  step.query_stride = hidden_size;
  step.key_cache = layer.cross_keys;
  step.value_cache = layer.cross_values;
  step.cache_strides = args.cross_strides;
  step.lengths = args.cross_lengths;
  step.kv_start = args.cross_start;
  step.cache_rows = args.cross_rows;
  step.max_kv_len = args.max_cross_len;
  step.rows = args.rows;
  step.num_heads = args.num_heads;
  step.head_dim = args.head_dim;
  step.softmax_scale = static_cast<float>(layer.softmax_scale);
  step.dtype = args.dtype;
  if (&layer == args.layers + args.num_layers - 1) step.weights = args.cross_weights;
  step.weight_rows = args.cache_rows;
  step.weight_positions = args.lengths;
  step.weight_row_stride = args.cross_weights_row_stride;
  step.weight_position_stride = args.cross_weights_position_stride;
  step.num_weights = args.max_cross_len;
  if (error == cudaSuccess) error = launch_step_attention<T>(step, stream, true);

  LinearArgs projection = product(args, out, step.out, hidden_size, hidden_size);
  projection.weight[0] = layer.cross_out_weight;
  projection.bias[0] = layer.cross_out_bias;
  projection.residual = middle;
  *out_partials = !args.post_norm && linear_takes_partials(projection)
                      ? reinterpret_cast<float2*>(workspace + parts.cross_partials)
                      : nullptr;
  chain = {true, false, nullptr, *out_partials};
  return error == cudaSuccess ? launch_linear<T>(projection, stream, chain) : error;
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
  attention.query_stride = 3 * hidden_size;
  attention.part_stride = hidden_size;
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
    if (!args.post_norm) {
      qkv.norm_weight = layer.norm1_weight;
      qkv.norm_bias = layer.norm1_bias;
    }
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
    float2* middle_partials = !args.post_norm && linear_takes_partials(projection)
                                  ? reinterpret_cast<float2*>(workspace + parts.middle_partials)
                                  : nullptr;
    chain = {true, false, nullptr, middle_partials};
    if (error == cudaSuccess) error = launch_linear<T>(projection, stream, chain);
    if (error == cudaSuccess && args.post_norm) {
      error =
          launch_post_norm<T>(args, projection.out, layer.norm1_weight, layer.norm1_bias, stream);
    }
    void* before_ffn = projection.out;
    if (layer.cross_keys != nullptr) {
      before_ffn = workspace + parts.cross;
      float2* cross_partials = nullptr;
      if (error == cudaSuccess) {
        error = launch_cross_attention<T>(args, layer, workspace, parts, projection.out, before_ffn,
                                          middle_partials, &cross_partials, stream);
      }
      middle_partials = cross_partials;
      if (error == cudaSuccess && args.post_norm) {
        error = launch_post_norm<T>(args, before_ffn, layer.cross_norm_weight,
                                    layer.cross_norm_bias, stream);
      }
    }

    LinearArgs first =
        product(args, workspace + parts.inner, before_ffn, hidden_size, args.intermediate_size);
    first.weight[0] = layer.fc1_weight;
    first.bias[0] = layer.fc1_bias;
    if (!args.post_norm) {
      first.norm_weight = layer.norm2_weight;
      first.norm_bias = layer.norm2_bias;
    }
    first.activation = args.activation;
    chain = {true, false, middle_partials, nullptr};
    if (error == cudaSuccess) error = launch_linear<T>(first, stream, chain);

    LinearArgs second = product(args, args.out, first.out, args.intermediate_size, hidden_size);
    second.weight[0] = layer.fc2_weight;
    second.bias[0] = layer.fc2_bias;
    second.residual = before_ffn;
    float2* partials = !args.post_norm && linear_takes_partials(second)
                           ? reinterpret_cast<float2*>(workspace + parts.out_partials)
                           : nullptr;
    chain = {true, false, nullptr, partials};
    if (error == cudaSuccess) error = launch_linear<T>(second, stream, chain);
    if (error == cudaSuccess && args.post_norm)
      error = launch_post_norm<T>(args, args.out, layer.norm2_weight, layer.norm2_bias, stream);
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

constexpr int64_t kMaxHeadDim = 256;

}  // namespace

int64_t decode_layers_workspace_bytes(const DecodeLayersArgs& args) {
  return workspace_parts(args).end;
}

Status decode_layers(const DecodeLayersArgs& args, const Context& context) {
  if (args.rows > kMaxSkinnyRows || args.head_dim > kMaxHeadDim)
    return Status{Status::kUnsupported};
  if (args.rows == 0) return Status{};
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_decode_layers<decltype(element)>(args, stream_of(context));
  }));
}

Status step_attention(const StepAttentionArgs& args, const Context& context) {
  constexpr int64_t kMaxRows = 65535;  // gridDim.z
  if (args.rows > kMaxRows || args.head_dim > kMaxHeadDim) return Status{Status::kUnsupported};
  if (args.rows == 0) return Status{};
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_step_attention<decltype(element)>(args, stream_of(context), false);
  }));
}

}  // namespace eet_patch::cuda
