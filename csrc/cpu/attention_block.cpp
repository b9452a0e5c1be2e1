// An attention block in one parallel region: q/k/v products, cache, attention, output product, norm
// and residual.
#include <cstring>

#include "cpu/team_ops.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

struct AttentionBlockSteps {
  LinearArgs qkv = {}, projection = {};
  AttentionArgs attention = {};
  LayerNormArgs norm = {};

  explicit AttentionBlockSteps(const AttentionBlockArgs& args) {
    const bool pre = args.norm == NormPlacement::kPre;
    const int64_t hidden_size = args.num_heads * args.head_dim;
    const int64_t bytes = element_bytes(args.dtype);
    char* buffer =
        static_cast<char*>(args.workspace);  // (total_tokens, 3 * hidden): queries, keys, values
    char* context = buffer + args.total_tokens * 3 * hidden_size * bytes;  // (total_tokens, hidden)

    qkv.out = buffer;
    qkv.input = args.hidden_states;
    for (int i = 0; i < args.num_qkv_weights; ++i) {
      qkv.weight[i] = args.qkv_weight[i];
      qkv.bias[i] = args.qkv_bias[i];
    }
    qkv.norm_weight = pre ? args.norm_weight : nullptr;
    qkv.norm_bias = pre ? args.norm_bias : nullptr;
    qkv.norm_eps = args.norm_eps;
    qkv.rows = args.total_tokens;
    qkv.in_features = qkv.input_stride = hidden_size;
    qkv.out_features = 3 * hidden_size / args.num_qkv_weights;
    qkv.out_stride = 3 * hidden_size;
    qkv.num_weights = args.num_qkv_weights;
    qkv.in_out = args.in_out;
    qkv.activation = Activation::kNone;
    qkv.dtype = args.dtype;

    attention.out = context;
    attention.query = buffer;
    attention.out_strides = {args.q_len * hidden_size, args.head_dim, hidden_size};
    attention.query_strides = {args.q_len * 3 * hidden_size, args.head_dim, 3 * hidden_size};
    if (args.key_cache != nullptr) {
      attention.key = args.key_cache;
      attention.value = args.value_cache;
      attention.key_strides = attention.value_strides = args.cache_strides;
    } else {
      attention.key = buffer + hidden_size * bytes;
      attention.value = buffer + 2 * hidden_size * bytes;
      attention.key_strides = attention.value_strides = attention.query_strides;
    }
    attention.mask = args.mask;
    attention.cu_seqlens = args.cu_seqlens;
    attention.kv_start = args.kv_start;
    attention.batch = args.batch;
    attention.num_heads = attention.num_kv_heads = args.num_heads;
    attention.head_dim = args.head_dim;
    attention.q_len = args.q_len;
    attention.kv_len = args.key_cache != nullptr ? args.past_len + args.q_len : args.q_len;
    attention.causal = args.causal;
    attention.softmax_scale = args.softmax_scale;
    attention.dtype = args.dtype;

    projection.out = args.out;
    projection.input = context;
    projection.weight[0] = args.out_weight;
    projection.bias[0] = args.out_bias;
    projection.residual = args.add_residual ? args.hidden_states : nullptr;
    projection.rows = args.total_tokens;
    projection.in_features = projection.input_stride = hidden_size;
    projection.out_features = projection.out_stride = hidden_size;
    projection.num_weights = 1;
    projection.in_out = args.in_out;
    projection.activation = Activation::kNone;
    projection.dtype = args.dtype;

    norm.out = args.out;
    norm.input = args.out;
    norm.weight = args.norm_weight;
    norm.bias = args.norm_bias;
    norm.rows = args.total_tokens;
    norm.hidden_size = hidden_size;
    norm.eps = args.norm_eps;
    norm.dtype = args.dtype;
  }
};

// Copies the new keys and values to their places in the cache; one thread a range of tokens.
void write_cache(const Team& team, const AttentionBlockArgs& args) {
  const int64_t bytes = element_bytes(args.dtype), hidden_size = args.num_heads * args.head_dim;
  const Range units = team.share(args.total_tokens * args.num_heads);
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t token = unit / args.num_heads, head = unit % args.num_heads;
    const int64_t batch = token / args.q_len, position = args.past_len + token % args.q_len;
    const char* source = static_cast<const char*>(args.workspace) +
                         ((token * 3 + 1) * hidden_size + head * args.head_dim) * bytes;
    const int64_t offset = (batch * args.cache_strides.batch + head * args.cache_strides.head +
                            position * args.cache_strides.token) *
                           bytes;
    std::memcpy(static_cast<char*>(args.key_cache) + offset, source, size_t(args.head_dim * bytes));
    std::memcpy(static_cast<char*>(args.value_cache) + offset, source + hidden_size * bytes,
                size_t(args.head_dim * bytes));
  }
}

}  // namespace

// Queries, keys and values of all tokens, and the attention's output, rounded to T as PyTorch does.
int64_t attention_block_workspace_bytes(const AttentionBlockArgs& args) {
  return args.total_tokens * 4 * args.num_heads * args.head_dim * element_bytes(args.dtype);
}

Status attention_block(const AttentionBlockArgs& args, const Context& context) {
  Status status;
  if (args.head_dim > 256) {
    status.code = Status::kUnsupported;
    return status;
  }
  if (args.total_tokens == 0) return status;
  const AttentionBlockSteps steps(args);
  float* packed = static_cast<float*>(
      thread_scratch(ScratchSlot::kPackedInput,
                     max64(linear_packed_bytes(steps.qkv), linear_packed_bytes(steps.projection))));
  const int64_t work = linear_work(steps.qkv) / 3 + attention_work(steps.attention) / 4;
  parallel(threads_for(work, context), [&](const Team& team) {
    linear_team(team, steps.qkv, packed);
    team.barrier();
    if (args.key_cache != nullptr) {
      write_cache(team, args);
      team.barrier();
    }
    attention_team(team, steps.attention);
    team.barrier();
    linear_team(team, steps.projection, packed);
    if (args.norm == NormPlacement::kPost) {
      team.barrier();
      layernorm_team(team, steps.norm);
    }
  });
  return status;
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
