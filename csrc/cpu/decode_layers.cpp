// The layers of one decode step, from the ops of this build. Rows of one length that stand in the
// cache as they are share one call of the general attention.
#include <cstring>
#include <vector>

#include "cpu/team_ops.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

struct Buffers {  // offsets in bytes
  int64_t context, middle, cross, inner, end;
};

Buffers buffers_of(const DecodeLayersArgs& args) {
  const int64_t bytes = args.rows * element_bytes(args.dtype);
  const int64_t hidden_size = args.num_heads * args.head_dim;
  Buffers parts;  // q, k and v stand at 0
  parts.context = 3 * hidden_size * bytes;
  parts.middle = parts.context + hidden_size * bytes;
  parts.cross = parts.middle + hidden_size * bytes;
  parts.inner = parts.cross + (args.layers[0].cross_keys != nullptr ? hidden_size * bytes : 0);
  parts.end = parts.inner + args.intermediate_size * bytes;
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
  linear.activation = Activation::kNone;
  linear.dtype = args.dtype;
  return linear;
}

int64_t cache_row(const DecodeLayersArgs& args, int64_t row) {
  return args.cache_rows != nullptr ? args.cache_rows[row] : row;
}

void write_cache(const DecodeLayersArgs& args, const DecodeLayer& layer, const char* qkv) {
  const int64_t bytes = element_bytes(args.dtype), hidden_size = args.num_heads * args.head_dim;
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t head = 0; head < args.num_heads; ++head) {
      const char* source = qkv + ((row * 3 + 1) * hidden_size + head * args.head_dim) * bytes;
      const int64_t target = cache_row(args, row) * args.cache_strides.batch +
                             head * args.cache_strides.head +
                             args.lengths[row] * args.cache_strides.token;
      const size_t size = size_t(args.head_dim * bytes);
      std::memcpy(static_cast<char*>(layer.key_cache) + target * bytes, source, size);
      std::memcpy(static_cast<char*>(layer.value_cache) + target * bytes,
                  source + hidden_size * bytes, size);
    }
  }
}

StepAttentionArgs step_attention_args(const DecodeLayersArgs& args, const DecodeLayer& layer,
                                      const char* query, char* context_out) {
  StepAttentionArgs step = {};
  step.out = context_out;
  step.query = query;
  step.rows = args.rows;
  step.num_heads = args.num_heads;
  step.head_dim = args.head_dim;
  step.softmax_scale = static_cast<float>(layer.softmax_scale);
  step.dtype = args.dtype;
  return step;
}

Status attend(const DecodeLayersArgs& args, const DecodeLayer& layer, const char* qkv,
              char* context_out, const Context& context) {
  const int64_t hidden_size = args.num_heads * args.head_dim;
  bool together = args.key_rows == nullptr;
  std::vector<int64_t> starts(size_t(args.rows), 0);
  for (int64_t row = 0; row < args.rows; ++row) {
    together = together && cache_row(args, row) == row && args.lengths[row] == args.lengths[0];
    if (args.kv_start != nullptr) starts[size_t(row)] = args.kv_start[row];
  }
  if (!together) {
    StepAttentionArgs step = step_attention_args(args, layer, qkv, context_out);
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
    step.appends = true;
    return EET_CPU_ARCH::step_attention(step, context);
  }
  write_cache(args, layer, qkv);
  AttentionArgs attention = {};
  attention.out = context_out;
  attention.query = qkv;
  attention.key = layer.key_cache;
  attention.value = layer.value_cache;
  attention.out_strides = {hidden_size, args.head_dim, hidden_size};
  attention.query_strides = {3 * hidden_size, args.head_dim, 3 * hidden_size};
  attention.key_strides = attention.value_strides = args.cache_strides;
  attention.kv_start = starts.data();
  attention.batch = args.rows;
  attention.num_heads = attention.num_kv_heads = args.num_heads;
  attention.head_dim = args.head_dim;
  attention.q_len = 1;
  attention.kv_len = args.lengths[0] + 1;
  attention.softmax_scale = static_cast<float>(layer.softmax_scale);
  attention.dtype = args.dtype;
  attention.mask.kind = MaskKind::kNone;
  return EET_CPU_ARCH::attention(attention, context);
}

// The query is made in `query`; weights of the last layer's attention go out where asked for.
Status attend_sentences(const DecodeLayersArgs& args, const DecodeLayer& layer, char* query,
                        char* context_out, const Context& context) {
  StepAttentionArgs step = step_attention_args(args, layer, query, context_out);
  step.query_stride = args.num_heads * args.head_dim;
  step.key_cache = layer.cross_keys;
  step.value_cache = layer.cross_values;
  step.cache_strides = args.cross_strides;
  step.lengths = args.cross_lengths;
  step.kv_start = args.cross_start;
  step.cache_rows = args.cross_rows;
  if (&layer == args.layers + args.num_layers - 1) step.weights = args.cross_weights;
  step.weight_rows = args.cache_rows;
  step.weight_positions = args.lengths;
  step.weight_row_stride = args.cross_weights_row_stride;
  step.weight_position_stride = args.cross_weights_position_stride;
  step.num_weights = args.max_cross_len;
  return EET_CPU_ARCH::step_attention(step, context);
}

Status normalise(const DecodeLayersArgs& args, char* hidden_states, const void* weight,
                 const void* bias, const Context& context) {
  LayerNormArgs norm = {};
  norm.out = hidden_states;
  norm.input = hidden_states;
  norm.weight = weight;
  norm.bias = bias;
  norm.rows = args.rows;
  norm.hidden_size = args.num_heads * args.head_dim;
  norm.eps = args.norm_eps;
  norm.dtype = args.dtype;
  return EET_CPU_ARCH::layernorm(norm, context);
}

}  // namespace

int64_t decode_layers_workspace_bytes(const DecodeLayersArgs& args) { return buffers_of(args).end; }

Status decode_layers(const DecodeLayersArgs& args, const Context& context) {
  Status status;
  if (args.head_dim > 256) {
    status.code = Status::kUnsupported;
    return status;
  }
  if (args.rows == 0) return status;
  const int64_t hidden_size = args.num_heads * args.head_dim;
  const Buffers parts = buffers_of(args);
  char* qkv_out = static_cast<char*>(args.workspace);
  char* context_out = qkv_out + parts.context;
  char* middle = qkv_out + parts.middle;
  char* inner = qkv_out + parts.inner;
  const bool pre_norm = !args.post_norm;
  const void* hidden_states = args.hidden_states;
  for (int64_t index = 0; index < args.num_layers && status.ok(); ++index) {
    const DecodeLayer& layer = args.layers[index];
    LinearArgs qkv =
        product(args, qkv_out, hidden_states, hidden_size, 3 * hidden_size / args.num_qkv_weights);
    qkv.out_stride = 3 * hidden_size;
    qkv.num_weights = args.num_qkv_weights;
    for (int i = 0; i < args.num_qkv_weights; ++i) {
      qkv.weight[i] = layer.qkv_weight[i];
      qkv.bias[i] = layer.qkv_bias[i];
    }
    qkv.norm_weight = pre_norm ? layer.norm1_weight : nullptr;
    qkv.norm_bias = layer.norm1_bias;
    status = EET_CPU_ARCH::linear(qkv, context);
    if (status.ok()) status = attend(args, layer, qkv_out, context_out, context);

    LinearArgs projection = product(args, middle, context_out, hidden_size, hidden_size);
    projection.weight[0] = layer.out_weight;
    projection.bias[0] = layer.out_bias;
    projection.residual = hidden_states;
    if (status.ok()) status = EET_CPU_ARCH::linear(projection, context);
    if (status.ok() && args.post_norm)
      status = normalise(args, middle, layer.norm1_weight, layer.norm1_bias, context);

    char* before_ffn = middle;
    if (layer.cross_keys != nullptr) {
      LinearArgs query = product(args, qkv_out, middle, hidden_size, hidden_size);
      query.weight[0] = layer.cross_query_weight;
      query.bias[0] = layer.cross_query_bias;
      query.norm_weight = pre_norm ? layer.cross_norm_weight : nullptr;
      query.norm_bias = layer.cross_norm_bias;
      if (status.ok()) status = EET_CPU_ARCH::linear(query, context);
      if (status.ok()) status = attend_sentences(args, layer, qkv_out, context_out, context);
      before_ffn = qkv_out + parts.cross;
      LinearArgs cross_out = product(args, before_ffn, context_out, hidden_size, hidden_size);
      cross_out.weight[0] = layer.cross_out_weight;
      cross_out.bias[0] = layer.cross_out_bias;
      cross_out.residual = middle;
      if (status.ok()) status = EET_CPU_ARCH::linear(cross_out, context);
      if (status.ok() && args.post_norm) {
        status =
            normalise(args, before_ffn, layer.cross_norm_weight, layer.cross_norm_bias, context);
      }
    }

    LinearArgs first = product(args, inner, before_ffn, hidden_size, args.intermediate_size);
    first.weight[0] = layer.fc1_weight;
    first.bias[0] = layer.fc1_bias;
    first.norm_weight = pre_norm ? layer.norm2_weight : nullptr;
    first.norm_bias = layer.norm2_bias;
    first.activation = args.activation;
    if (status.ok()) status = EET_CPU_ARCH::linear(first, context);

    LinearArgs second = product(args, args.out, inner, args.intermediate_size, hidden_size);
    second.weight[0] = layer.fc2_weight;
    second.bias[0] = layer.fc2_bias;
    second.residual = before_ffn;
    if (status.ok()) status = EET_CPU_ARCH::linear(second, context);
    if (status.ok() && args.post_norm) {
      status = normalise(args, static_cast<char*>(args.out), layer.norm2_weight, layer.norm2_bias,
                         context);
    }
    hidden_states = args.out;
  }
  if (args.head_weight == nullptr || !status.ok()) return status;
  LinearArgs head = product(args, args.logits, hidden_states, hidden_size, args.vocab_size);
  head.in_out = false;
  head.weight[0] = args.head_weight;
  head.norm_weight = args.head_norm_weight;
  head.norm_bias = args.head_norm_bias;
  return EET_CPU_ARCH::linear(head, context);
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
