// The layers of one decode step, from the ops of this build. Rows of one length that stand in the
// cache as they are share one attention call; others are attended one by one, and beams whose past
// is scattered over the cache have it gathered first.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/team_ops.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

struct Buffers {  // offsets in bytes
  int64_t context, middle, inner, end;
};

Buffers buffers_of(const DecodeLayersArgs& args) {
  const int64_t bytes = args.rows * element_bytes(args.dtype);
  const int64_t hidden_size = args.num_heads * args.head_dim;
  Buffers parts;  // q, k and v stand at 0
  parts.context = 3 * hidden_size * bytes;
  parts.middle = parts.context + hidden_size * bytes;
  parts.inner = parts.middle + hidden_size * bytes;
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

// The keys or values that `row` sees, one head after the other, from the cache rows that
// `key_rows` names.
void gather(const DecodeLayersArgs& args, const void* cache, int64_t row, char* out) {
  const int64_t bytes = element_bytes(args.dtype), length = args.lengths[row];
  for (int64_t head = 0; head < args.num_heads; ++head) {
    for (int64_t position = 0; position <= length; ++position) {
      const int64_t from =
          position < length ? args.key_rows[row * args.capacity + position] : cache_row(args, row);
      const int64_t source = from * args.cache_strides.batch + head * args.cache_strides.head +
                             position * args.cache_strides.token;
      std::memcpy(out + (head * (length + 1) + position) * args.head_dim * bytes,
                  static_cast<const char*>(cache) + source * bytes, size_t(args.head_dim * bytes));
    }
  }
}

Status attend(const DecodeLayersArgs& args, const DecodeLayer& layer, const char* qkv,
              char* context_out, const Context& context) {
  const int64_t bytes = element_bytes(args.dtype), hidden_size = args.num_heads * args.head_dim;
  AttentionArgs attention = {};
  attention.out_strides = {hidden_size, args.head_dim, hidden_size};
  attention.query_strides = {3 * hidden_size, args.head_dim, 3 * hidden_size};
  attention.key_strides = attention.value_strides = args.cache_strides;
  attention.num_heads = attention.num_kv_heads = args.num_heads;
  attention.head_dim = args.head_dim;
  attention.q_len = 1;
  attention.softmax_scale = static_cast<float>(layer.softmax_scale);
  attention.dtype = args.dtype;
  attention.mask.kind = MaskKind::kNone;

  bool together = args.key_rows == nullptr;
  std::vector<int64_t> starts(size_t(args.rows), 0);
  for (int64_t row = 0; row < args.rows; ++row) {
    together = together && cache_row(args, row) == row && args.lengths[row] == args.lengths[0];
    if (args.kv_start != nullptr) starts[size_t(row)] = args.kv_start[row];
  }
  std::vector<char> gathered;
  Status status;
  for (int64_t row = 0; row < args.rows && status.ok(); row += together ? args.rows : 1) {
    const int64_t kv_len = args.lengths[row] + 1;
    attention.batch = together ? args.rows : 1;
    attention.kv_len = kv_len;
    attention.out = context_out + row * hidden_size * bytes;
    attention.query = qkv + row * 3 * hidden_size * bytes;
    attention.kv_start = starts.data() + row;
    if (args.key_rows != nullptr) {
      const int64_t size = args.num_heads * kv_len * args.head_dim;
      gathered.resize(size_t(2 * size * bytes));
      gather(args, layer.key_cache, row, gathered.data());
      gather(args, layer.value_cache, row, gathered.data() + size * bytes);
      attention.key = gathered.data();
      attention.value = gathered.data() + size * bytes;
      attention.key_strides =
          attention.value_strides = {size, kv_len * args.head_dim, args.head_dim};
    } else {
      const int64_t offset = cache_row(args, row) * args.cache_strides.batch * bytes;
      attention.key = static_cast<const char*>(layer.key_cache) + offset;
      attention.value = static_cast<const char*>(layer.value_cache) + offset;
    }
    status = EET_CPU_ARCH::attention(attention, context);
  }
  return status;
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
    qkv.norm_weight = layer.norm1_weight;
    qkv.norm_bias = layer.norm1_bias;
    status = EET_CPU_ARCH::linear(qkv, context);
    write_cache(args, layer, qkv_out);
    if (status.ok()) status = attend(args, layer, qkv_out, context_out, context);

    LinearArgs projection = product(args, middle, context_out, hidden_size, hidden_size);
    projection.weight[0] = layer.out_weight;
    projection.bias[0] = layer.out_bias;
    projection.residual = hidden_states;
    if (status.ok()) status = EET_CPU_ARCH::linear(projection, context);

    LinearArgs first = product(args, inner, middle, hidden_size, args.intermediate_size);
    first.weight[0] = layer.fc1_weight;
    first.bias[0] = layer.fc1_bias;
    first.norm_weight = layer.norm2_weight;
    first.norm_bias = layer.norm2_bias;
    first.activation = args.activation;
    if (status.ok()) status = EET_CPU_ARCH::linear(first, context);

    LinearArgs second = product(args, args.out, inner, args.intermediate_size, hidden_size);
    second.weight[0] = layer.fc2_weight;
    second.bias[0] = layer.fc2_bias;
    second.residual = middle;
    if (status.ok()) status = EET_CPU_ARCH::linear(second, context);
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
