// One attention block of a layer for few tokens, as a chain of launches, each able to start before
// the one ahead of it ends: [layer norm +] q/k/v product, K and V into the cache, attention, output
// product + residual [, layer norm].
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/launchers.h"

namespace eet_patch::cuda {
namespace {

constexpr int kCacheThreads = 128;

struct Workspace {                  // offsets in bytes
  int64_t context, attention, end;  // q, k and v stand at 0
};

AttentionArgs attention_args(const AttentionBlockArgs& args, char* workspace,
                             const Workspace& parts) {
  const int64_t hidden_size = args.num_heads * args.head_dim, bytes = element_size(args.dtype);
  const HeadStrides qkv_strides = {args.q_len * 3 * hidden_size, args.head_dim, 3 * hidden_size};
  AttentionArgs attention = {};
  attention.out = workspace + parts.context;
  attention.out_strides = {args.q_len * hidden_size, args.head_dim, hidden_size};
  attention.query = workspace;
  attention.query_strides = qkv_strides;
  if (args.key_cache != nullptr) {
    attention.key = args.key_cache;
    attention.value = args.value_cache;
    attention.key_strides = attention.value_strides = args.cache_strides;
  } else {
    attention.key = workspace + hidden_size * bytes;
    attention.value = workspace + 2 * hidden_size * bytes;
    attention.key_strides = attention.value_strides = qkv_strides;
  }
  attention.mask = args.mask;
  attention.kv_start = args.kv_start;
  attention.cu_seqlens = args.cu_seqlens;
  attention.batch = args.batch;
  attention.num_heads = attention.num_kv_heads = args.num_heads;
  attention.head_dim = args.head_dim;
  attention.q_len = args.q_len;
  attention.kv_len = args.key_cache != nullptr ? args.past_len + args.q_len : args.q_len;
  attention.causal = args.causal;
  attention.softmax_scale = args.softmax_scale;
  attention.dtype = args.dtype;
  attention.workspace = workspace + parts.attention;
  attention.workspace_bytes = parts.end - parts.attention;
  return attention;
}

Workspace workspace_parts(const AttentionBlockArgs& args) {
  const int64_t hidden_size = args.num_heads * args.head_dim, bytes = element_size(args.dtype);
  Workspace parts = {};
  parts.context = workspace_part(args.total_tokens * 3 * hidden_size * bytes);
  parts.attention = parts.context + workspace_part(args.total_tokens * hidden_size * bytes);
  const AttentionArgs attention = attention_args(args, nullptr, parts);
  const bool decode = takes_decode_attention(attention);
  parts.end =
      parts.attention + (decode ? workspace_part(decode_attention_workspace_bytes(attention)) : 0);
  return parts;
}

// Copies the new keys (blockIdx.z = 0) and values (1) of one token a blockIdx.y from the packed
// q/k/v rows to their place in the cache. kVector > 1 needs head_dim, strides and addresses that
// are 16-byte aligned.
template <typename T, int kVector>
__global__ void __launch_bounds__(kCacheThreads)
    cache_write_kernel(T* key_cache, T* value_cache, const T* qkv, HeadStrides strides,
                       int64_t past_len, int q_len, int head_dim, int hidden_size) {
  release_dependents();
  wait_for_predecessor();
  const int column = (blockIdx.x * kCacheThreads + threadIdx.x) * kVector;
  if (column >= hidden_size) return;
  const int token = blockIdx.y, head = column / head_dim;
  const T* source = qkv + (int64_t(token) * 3 + 1 + blockIdx.z) * hidden_size + column;
  T* target = (blockIdx.z == 0 ? key_cache : value_cache) + token / q_len * strides.batch +
              head * strides.head + (past_len + token % q_len) * strides.token +
              (column - head * head_dim);
  *reinterpret_cast<Vector<T, kVector>*>(target) =
      *reinterpret_cast<const Vector<T, kVector>*>(source);
}

template <typename T>
cudaError_t launch_cache_write(const AttentionBlockArgs& args, const T* qkv, cudaStream_t stream) {
  const int64_t hidden_size = args.num_heads * args.head_dim;
  constexpr int kVector = kVectorSize<T>;
  const bool vectors =
      args.head_dim % kVector == 0 && is_aligned(args.key_cache) && is_aligned(args.value_cache) &&
      is_aligned(qkv) && args.cache_strides.batch % kVector == 0 &&
      args.cache_strides.head % kVector == 0 && args.cache_strides.token % kVector == 0;
  LaunchConfig config;
  config.stream = stream;
  config.chained = true;
  config.block = dim3(kCacheThreads);
  config.grid =
      dim3(static_cast<unsigned>(ceil_div(hidden_size, kCacheThreads * (vectors ? kVector : 1))),
           static_cast<unsigned>(args.total_tokens), 2);
  return launch(config, vectors ? cache_write_kernel<T, kVector> : cache_write_kernel<T, 1>,
                static_cast<T*>(args.key_cache), static_cast<T*>(args.value_cache), qkv,
                args.cache_strides, args.past_len, static_cast<int>(args.q_len),
                static_cast<int>(args.head_dim), static_cast<int>(hidden_size));
}

template <typename T>
cudaError_t launch_attention_block(const AttentionBlockArgs& args, cudaStream_t stream) {
  const int64_t hidden_size = args.num_heads * args.head_dim;
  const Workspace parts = workspace_parts(args);
  if (args.workspace == nullptr || args.workspace_bytes < parts.end) return cudaErrorInvalidValue;
  char* workspace = static_cast<char*>(args.workspace);

  LinearArgs qkv = {};
  qkv.out = workspace;
  qkv.input = args.hidden_states;
  for (int i = 0; i < args.num_qkv_weights; ++i) {
    qkv.weight[i] = args.qkv_weight[i];
    qkv.bias[i] = args.qkv_bias[i];
  }
  if (args.norm == NormPlacement::kPre) {
    qkv.norm_weight = args.norm_weight;
    qkv.norm_bias = args.norm_bias;
    qkv.norm_eps = args.norm_eps;
  }
  qkv.rows = args.total_tokens;
  qkv.in_features = hidden_size;
  qkv.out_features = args.num_qkv_weights == 1 ? 3 * hidden_size : hidden_size;
  qkv.input_stride = hidden_size;
  qkv.out_stride = 3 * hidden_size;
  qkv.num_weights = args.num_qkv_weights;
  qkv.in_out = args.in_out;
  qkv.dtype = args.dtype;
  cudaError_t error = launch_linear<T>(qkv, stream, LinearChain());
  if (error == cudaSuccess && args.key_cache != nullptr) {
    error = launch_cache_write<T>(args, reinterpret_cast<const T*>(workspace), stream);
  }

  const AttentionArgs attention = attention_args(args, workspace, parts);
  if (error == cudaSuccess) error = launch_attention<T>(attention, stream, true);

  LinearArgs projection = {};
  projection.out = args.out;
  projection.input = attention.out;
  projection.weight[0] = args.out_weight;
  projection.bias[0] = args.out_bias;
  projection.residual = args.add_residual ? args.hidden_states : nullptr;
  projection.rows = args.total_tokens;
  projection.in_features = projection.out_features = hidden_size;
  projection.input_stride = projection.out_stride = hidden_size;
  projection.num_weights = 1;
  projection.in_out = args.in_out;
  projection.dtype = args.dtype;
  if (error == cudaSuccess) error = launch_linear<T>(projection, stream, LinearChain{true});

  if (error == cudaSuccess && args.norm == NormPlacement::kPost) {
    BiasResidualLayerNormArgs norm = {};
    norm.out = args.out;
    norm.input = args.out;
    norm.weight = args.norm_weight;
    norm.norm_bias = args.norm_bias;
    norm.rows = args.total_tokens;
    norm.hidden_size = hidden_size;
    norm.eps = args.norm_eps;
    norm.dtype = args.dtype;
    error = launch_layernorm<T>(norm, stream, true);
  }
  return error;
}

}  // namespace

int64_t attention_block_workspace_bytes(const AttentionBlockArgs& args) {
  return workspace_parts(args).end;
}

Status attention_block(const AttentionBlockArgs& args, const Context& context) {
  constexpr int64_t kMaxHeadDim = 256;
  if (args.total_tokens > kMaxSkinnyRows || args.head_dim > kMaxHeadDim)
    return Status{Status::kUnsupported};
  if (args.total_tokens == 0) return Status{};
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_attention_block<decltype(element)>(args, stream_of(context));
  }));
}

}  // namespace eet_patch::cuda
