// The layers of one decode step as a chain of launches, five a layer, each able to start before the
// one ahead of it ends: layer norm + q/k/v product, attention with the new key and value written to
// the cache, output product + residual, layer norm + first product + activation, second product +
// residual; the head behind the last one is a link of the same chain. Cross-attention is three
// launches more. A norm behind a block is done by whoever reads it: by the next product of its
// input, and by the one that adds it to what it makes. Everything that changes from step to step is
// read from device memory, so that the chain can be captured once and replayed.
#include <algorithm>

#include "common/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/step_attention_launch.cuh"

namespace eet_patch::cuda {
namespace {

struct Workspace {  // offsets in bytes; the q/k/v rows stand at 0
  int64_t context, middle, inner, middle_partials, out_partials, cross, cross_partials, end;
};

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

// A norm behind a block as a launch of its own, in place.
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

// A layer norm that has yet to be done of a buffer, and what the launch that filled it left for it:
// the next product does it on its way in, and the one after that of its residual.
struct PendingNorm {
  const void *weight = nullptr, *bias = nullptr;
  const float2* partials = nullptr;
};

// The launches of one step. Where the layers normalise before their blocks, that norm is part of
// the block's first product; where behind them, of the products that read the result, or, if those
// can't, a launch of its own.
template <typename T>
struct StepLaunches {
  const DecodeLayersArgs& args;
  cudaStream_t stream;
  const Workspace parts = workspace_parts(args);
  char* const workspace = static_cast<char*>(args.workspace);
  const int64_t hidden_size = args.num_heads * args.head_dim;
  const bool fuses_post_norm = args.post_norm && takes_residual_norms();

  bool takes_residual_norms() const {
    LinearArgs linear = product(args, workspace, workspace, hidden_size, hidden_size);
    LinearArgs last = product(args, workspace, workspace, args.intermediate_size, hidden_size);
    for (int64_t i = 0; i < args.num_layers; ++i) {
      const DecodeLayer& layer = args.layers[i];
      linear.weight[0] = layer.out_weight;
      last.weight[0] = layer.fc2_weight;
      if (!linear_takes_residual_norm(linear) || !linear_takes_residual_norm(last)) return false;
      linear.weight[0] = layer.cross_out_weight;
      if (layer.cross_keys != nullptr && !linear_takes_residual_norm(linear)) return false;
    }
    return true;
  }

  // The first product of a block: its norm is the block's own, or what is pending.
  cudaError_t enter(LinearArgs linear, const PendingNorm& pending, const void* norm_weight,
                    const void* norm_bias, LinearChain chain) const {
    linear.norm_weight = args.post_norm ? pending.weight : norm_weight;
    linear.norm_bias = args.post_norm ? pending.bias : norm_bias;
    chain.norm_partials = pending.partials;
    return launch_linear<T>(linear, stream, chain);
  }

  // The last product of a block, of a residual that `pending` tells of, which then tells of its
  // result. `partials`: where that leaves its statistics.
  cudaError_t leave(LinearArgs linear, int64_t partials, const void* norm_weight,
                    const void* norm_bias, PendingNorm& pending) const {
    LinearChain chain;
    chain.chained = true;
    chain.residual_norm_weight = pending.weight;
    chain.residual_norm_bias = pending.bias;
    chain.residual_partials = pending.partials;
    if (args.post_norm ? fuses_post_norm : linear_takes_partials(linear))
      chain.out_partials = reinterpret_cast<float2*>(workspace + partials);
    const cudaError_t error = launch_linear<T>(linear, stream, chain);
    pending = {};
    pending.partials = chain.out_partials;
    if (!args.post_norm || error != cudaSuccess) return error;
    if (fuses_post_norm) {
      pending.weight = norm_weight;
      pending.bias = norm_bias;
      return error;
    }
    return launch_post_norm<T>(args, linear.out, norm_weight, norm_bias, stream);
  }

  // From `middle` to `out`; the query and the context go where the layer's own were.
  cudaError_t cross_attention(const DecodeLayer& layer, void* middle, void* out,
                              PendingNorm& pending) const {
    LinearArgs query = product(args, workspace, middle, hidden_size, hidden_size);
    query.weight[0] = layer.cross_query_weight;
    query.bias[0] = layer.cross_query_bias;
    LinearChain chain;
    chain.chained = true;
    cudaError_t error =
        enter(query, pending, layer.cross_norm_weight, layer.cross_norm_bias, chain);

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
    if (error != cudaSuccess) return error;
    return leave(projection, parts.cross_partials, layer.cross_norm_weight, layer.cross_norm_bias,
                 pending);
  }

  cudaError_t self_attention(const DecodeLayer& layer, const void* hidden_states, bool chained,
                             PendingNorm& pending) const {
    LinearArgs qkv = product(args, workspace, hidden_states, hidden_size,
                             args.num_qkv_weights == 1 ? 3 * hidden_size : hidden_size);
    qkv.out_stride = 3 * hidden_size;
    qkv.num_weights = args.num_qkv_weights;
    for (int i = 0; i < args.num_qkv_weights; ++i) {
      qkv.weight[i] = layer.qkv_weight[i];
      qkv.bias[i] = layer.qkv_bias[i];
    }
    LinearChain chain;
    chain.chained = chained;
    chain.release_late = true;  // attention reads its past ahead
    cudaError_t error = enter(qkv, pending, layer.norm1_weight, layer.norm1_bias, chain);

    StepAttentionArgs step = {};
    step.out = workspace + parts.context;
    step.query = workspace;
    step.query_stride = 3 * hidden_size;
    step.key_offset = hidden_size;
    step.value_offset = 2 * hidden_size;
    step.key_cache = layer.key_cache;
    step.value_cache = layer.value_cache;
    step.cache_strides = args.cache_strides;
    step.lengths = args.lengths;
    step.kv_start = args.kv_start;
    step.cache_rows = args.cache_rows;
    step.key_rows = args.key_rows;
    step.capacity = args.capacity;
    step.max_kv_len = args.max_kv_len;
    step.rows = args.rows;
    step.num_heads = args.num_heads;
    step.head_dim = args.head_dim;
    step.appends = true;
    step.softmax_scale = static_cast<float>(layer.softmax_scale);
    step.dtype = args.dtype;
    if (error == cudaSuccess) error = launch_step_attention<T>(step, stream, true);

    LinearArgs projection =
        product(args, workspace + parts.middle, step.out, hidden_size, hidden_size);
    projection.weight[0] = layer.out_weight;
    projection.bias[0] = layer.out_bias;
    projection.residual = hidden_states;
    if (error != cudaSuccess) return error;
    return leave(projection, parts.middle_partials, layer.norm1_weight, layer.norm1_bias, pending);
  }

  cudaError_t feed_forward(const DecodeLayer& layer, void* hidden_states,
                           PendingNorm& pending) const {
    LinearArgs first =
        product(args, workspace + parts.inner, hidden_states, hidden_size, args.intermediate_size);
    first.weight[0] = layer.fc1_weight;
    first.bias[0] = layer.fc1_bias;
    first.activation = args.activation;
    LinearChain chain;
    chain.chained = true;
    const cudaError_t error = enter(first, pending, layer.norm2_weight, layer.norm2_bias, chain);
    LinearArgs second = product(args, args.out, first.out, args.intermediate_size, hidden_size);
    second.weight[0] = layer.fc2_weight;
    second.bias[0] = layer.fc2_bias;
    second.residual = hidden_states;
    if (error != cudaSuccess) return error;
    return leave(second, parts.out_partials, layer.norm2_weight, layer.norm2_bias, pending);
  }

  cudaError_t layer(const DecodeLayer& layer, const void* hidden_states, bool chained,
                    PendingNorm& pending) const {
    cudaError_t error = self_attention(layer, hidden_states, chained, pending);
    void* before_ffn = workspace + parts.middle;
    if (error == cudaSuccess && layer.cross_keys != nullptr) {
      error = cross_attention(layer, before_ffn, workspace + parts.cross, pending);
      before_ffn = workspace + parts.cross;
    }
    return error == cudaSuccess ? feed_forward(layer, before_ffn, pending) : error;
  }

  cudaError_t head(PendingNorm pending, bool chained) const {
    LinearArgs head =
        product(args, args.logits, args.num_layers > 0 ? args.out : args.hidden_states, hidden_size,
                args.vocab_size);
    head.in_out = false;
    head.weight[0] = args.head_weight;
    head.norm_weight = pending.weight != nullptr ? pending.weight : args.head_norm_weight;
    head.norm_bias = pending.weight != nullptr ? pending.bias : args.head_norm_bias;
    LinearChain chain;
    chain.chained = chained;
    chain.norm_partials = linear_takes_partials(head) ? pending.partials : nullptr;
    return launch_linear<T>(head, stream, chain);
  }

  cudaError_t all() const {
    if (args.workspace == nullptr || args.workspace_bytes < parts.end) return cudaErrorInvalidValue;
    cudaError_t error = cudaSuccess;
    const void* hidden_states = args.hidden_states;
    PendingNorm pending;  // of hidden_states
    for (int64_t index = 0; index < args.num_layers && error == cudaSuccess; ++index) {
      error = layer(args.layers[index], hidden_states, index > 0 || args.chained, pending);
      hidden_states = args.out;
    }
    const bool has_head = args.head_weight != nullptr;
    if (error == cudaSuccess && pending.weight != nullptr &&
        !(has_head && args.head_norm_weight == nullptr)) {
      error = launch_post_norm<T>(args, args.out, pending.weight, pending.bias, stream);
      pending = {};
    }
    if (!has_head || error != cudaSuccess) return error;
    return head(pending, args.num_layers > 0 || args.chained);
  }
};

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
    return StepLaunches<decltype(element)>{args, stream_of(context)}.all();
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
