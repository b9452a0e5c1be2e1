// The layers of one decode step as a chain of launches, five a layer, each able to start before the
// one ahead of it ends: layer norm + q/k/v product, attention with the new key and value written to
// the cache, output product + residual, layer norm + first product + activation, second product +
// residual. Everything that changes from step to step is read from device memory, so that the chain
// can be captured once and replayed.
#include <algorithm>

#include "common/attention_mask.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "cuda/launchers.h"

namespace eet_patch::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kMinSplitKeys = 64;
constexpr int kPartialExtra = 2;  // maximum and sum, after the head_dim weighted values

template <typename T>
struct StepAttentionParams {
  T* out;        // (rows, hidden_size)
  const T* qkv;  // (rows, 3 * hidden_size)
  T *key_cache, *value_cache;
  const int32_t *lengths, *kv_start, *cache_rows, *key_rows;
  float* partials;     // (rows, num_heads, splits, head_dim + kPartialExtra)
  unsigned* arrivals;  // (rows, num_heads), zero between launches
  HeadStrides strides;
  int64_t capacity;
  int num_heads, head_dim;
  bool vectors;  // rows may be read and written 16 bytes at a time
  float scale;   // softmax_scale * log2(e): exp2 serves
};

// kVector elements from an address that may not be aligned, and may end early.
template <typename T>
__device__ __forceinline__ uint4 load_piece(const T* source, int count, bool vectors) {
  if (count <= 0) return make_uint4(0, 0, 0, 0);
  if (vectors) return load_cache(source);
  Vector<T, kVectorSize<T>> elements;
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i)
    elements.data[i] = i < count ? source[i] : from_float<T>(0.0f);
  return reinterpret_cast<const uint4&>(elements);
}

// blockIdx: one split of the keys (x) of one head (y) of one row (z). The keys are divided evenly
// over the blocks at whatever length the row has. kLanes lanes own a key at a time, kPieces 16-byte
// pieces of it each, with a running softmax of their own; groups meet by shuffles, warps in shared
// memory, and the last block of a head adds the splits in their order (Flash-Decoding, Dao et al.
// 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html), so that two runs give the same
// bits. The new key and value come from the q/k/v product and are written to the cache by the block
// whose split holds them. Reads K and V once.
template <typename T, int kLanes, int kPieces>
__global__ void __launch_bounds__(kThreads) step_attention_kernel(const StepAttentionParams<T> p) {
  constexpr int kVector = kVectorSize<T>;
  constexpr int kGroups = kThreads / kLanes;
  constexpr int kUnroll = kPieces == 1 ? 4 : kPieces <= 3 ? 2 : 1;
  constexpr int kHeadDim = kLanes * kPieces * kVector;
  __shared__ float warp_out[kWarps][kHeadDim], warp_maximum[kWarps], warp_total[kWarps];
  __shared__ bool is_last;

  release_dependents();
  wait_for_predecessor();
  const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, splits = gridDim.x;
  const int length = p.lengths[row];
  const int start = p.kv_start != nullptr ? max(0, min(p.kv_start[row], length + 1)) : 0;
  const int keys = length + 1 - start;
  const int split_keys = max(kMinSplitKeys, (keys + splits - 1) / splits);
  const int used = max(1, (keys + split_keys - 1) / split_keys);  // blocks that have keys
  if (split >= used) return;
  const int begin = start + split * split_keys, end = min(begin + split_keys, length + 1);
  const int cache_row = p.cache_rows != nullptr ? p.cache_rows[row] : row;
  const int32_t* key_rows = p.key_rows != nullptr ? p.key_rows + row * p.capacity : nullptr;
  const int64_t hidden_size = int64_t(p.num_heads) * p.head_dim;
  const T* query = p.qkv + row * 3 * hidden_size + head * p.head_dim;
  const T* new_key = query + hidden_size;
  const T* new_value = new_key + hidden_size;
  const int64_t head_offset = head * p.strides.head;
  const int64_t own_row = cache_row * p.strides.batch + head_offset;

  if (split == used - 1) {
    const int64_t target = own_row + length * p.strides.token;
    for (int column = threadIdx.x; column < p.head_dim; column += kThreads) {
      p.key_cache[target + column] = new_key[column];
      p.value_cache[target + column] = new_value[column];
    }
  }

  const int group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  float q[kPieces][kVector], out[kPieces][kVector] = {};
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int column = (piece * kLanes + lane) * kVector;
    unpack_vector<T>(load_piece(query + column, p.head_dim - column, p.vectors), q[piece]);
  }
  float maximum = -INFINITY, total = 0.0f;
  for (int first = begin; first < end; first += kGroups * kUnroll) {
    uint4 loaded_keys[kUnroll][kPieces], loaded_values[kUnroll][kPieces];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int key = first + u * kGroups + group;
      const T *key_source = new_key, *value_source = new_value;
      if (key < length && key < end) {
        const int64_t base =
            key_rows != nullptr ? key_rows[key] * p.strides.batch + head_offset : own_row;
        key_source = p.key_cache + base + key * p.strides.token;
        value_source = p.value_cache + base + key * p.strides.token;
      }
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int column = (piece * kLanes + lane) * kVector,
                  count = key < end ? p.head_dim - column : 0;
        loaded_keys[u][piece] = load_piece(key_source + column, count, p.vectors);
        loaded_values[u][piece] = load_piece(value_source + column, count, p.vectors);
      }
    }
    float scores[kUnroll];
    float highest = maximum;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float score = 0.0f;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        float key[kVector];
        unpack_vector<T>(loaded_keys[u][piece], key);
#pragma unroll
        for (int i = 0; i < kVector; ++i) score = fmaf(q[piece][i], key[i], score);
      }
      score = warp_sum<kLanes>(score) * p.scale;
      scores[u] = first + u * kGroups + group < end ? score : -INFINITY;
      highest = fmaxf(highest, scores[u]);
    }
    const float shift = highest == -INFINITY ? 0.0f : highest;
    const float correction = exp2_fast(maximum - shift);
    maximum = highest;
    total *= correction;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) out[piece][i] *= correction;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float probability = exp2_fast(scores[u] - shift);
      total += probability;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        float value[kVector];
        unpack_vector<T>(loaded_values[u][piece], value);
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          out[piece][i] = fmaf(probability, value[i], out[piece][i]);
      }
    }
  }

#pragma unroll
  for (int offset = kLanes; offset < kWarpSize; offset *= 2) {
    const float highest = fmaxf(maximum, __shfl_xor_sync(kFullMask, maximum, offset));
    const float correction = exp2_fast(maximum - (highest == -INFINITY ? 0.0f : highest));
    maximum = highest;
    total *= correction;
    total += __shfl_xor_sync(kFullMask, total, offset);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float scaled = out[piece][i] * correction;
        out[piece][i] = scaled + __shfl_xor_sync(kFullMask, scaled, offset);
      }
    }
  }
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize < kLanes) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        warp_out[warp][(piece * kLanes + lane) * kVector + i] = out[piece][i];
    }
    if (lane == 0) warp_maximum[warp] = maximum, warp_total[warp] = total;
  }
  __syncthreads();

  float highest = -INFINITY;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, warp_maximum[w]);
  const float shift = highest == -INFINITY ? 0.0f : highest;
  float weights[kWarps];
  total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    weights[w] = exp2_fast(warp_maximum[w] - shift);
    total += weights[w] * warp_total[w];
  }
  const int stride = p.head_dim + kPartialExtra;
  const int64_t pair = int64_t(row) * p.num_heads + head;
  float* first_partial = p.partials + pair * splits * stride;
  T* target = p.out + row * hidden_size + head * p.head_dim;
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int column = threadIdx.x; column < p.head_dim; column += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += weights[w] * warp_out[w][column];
    if (used == 1) {
      target[column] = from_float<T>(sum * inverse);
    } else {
      first_partial[split * stride + column] = sum;
    }
  }
  if (used == 1) return;
  if (threadIdx.x == 0) {
    first_partial[split * stride + p.head_dim] = highest;
    first_partial[split * stride + p.head_dim + 1] = total;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(p.arrivals + pair, 1u) == static_cast<unsigned>(used - 1);
    if (is_last) p.arrivals[pair] = 0;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  highest = -INFINITY;
  for (int s = 0; s < used; ++s)
    highest = fmaxf(highest, __ldcg(first_partial + s * stride + p.head_dim));
  const float base = highest == -INFINITY ? 0.0f : highest;
  for (int column = threadIdx.x; column < p.head_dim; column += kThreads) {
    float sum = 0.0f, all = 0.0f;
    for (int s = 0; s < used; ++s) {
      const float* partial = first_partial + s * stride;
      const float weight = exp2_fast(__ldcg(partial + p.head_dim) - base);
      sum += weight * __ldcg(partial + column);
      all += weight * __ldcg(partial + p.head_dim + 1);
    }
    target[column] = from_float<T>(all == 0.0f ? 0.0f : sum / all);
  }
}

struct Workspace {  // offsets in bytes; the arrivals stand at 0
  int64_t qkv, context, middle, inner, partials, end;
};

int attention_splits(const DecodeLayersArgs& args) {
  const int64_t pairs = std::max<int64_t>(1, args.rows * args.num_heads);
  const int64_t blocks =
      int64_t(kBlocksPerMultiprocessor) * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t splits =
      std::min(ceil_div(blocks, pairs), ceil_div(args.max_kv_len, kMinSplitKeys));
  return static_cast<int>(std::max<int64_t>(1, splits));
}

Workspace workspace_parts(const DecodeLayersArgs& args) {
  const int64_t hidden_size = args.num_heads * args.head_dim;
  const int64_t bytes = args.rows * element_size(args.dtype);
  Workspace parts = {};
  // The arrivals outlast a call, and the next one may have other rows: their place must not depend
  // on them.
  parts.qkv = workspace_part(kMaxSkinnyRows * args.num_heads * int64_t(sizeof(unsigned)));
  parts.context = parts.qkv + workspace_part(3 * hidden_size * bytes);
  parts.middle = parts.context + workspace_part(hidden_size * bytes);
  parts.inner = parts.middle + workspace_part(hidden_size * bytes);
  parts.partials = parts.inner + workspace_part(args.intermediate_size * bytes);
  parts.end =
      parts.partials + workspace_part(args.rows * args.num_heads * attention_splits(args) *
                                      (args.head_dim + kPartialExtra) * int64_t(sizeof(float)));
  return parts;
}

template <typename T, int kLanes, int kPieces>
cudaError_t launch_step_attention(const StepAttentionParams<T>& p, const DecodeLayersArgs& args,
                                  cudaStream_t stream) {
  LaunchConfig config;
  config.stream = stream;
  config.chained = true;
  config.block = dim3(kThreads);
  config.grid = dim3(static_cast<unsigned>(attention_splits(args)),
                     static_cast<unsigned>(args.num_heads), static_cast<unsigned>(args.rows));
  return launch(config, step_attention_kernel<T, kLanes, kPieces>, p);
}

template <typename T>
cudaError_t launch_step_attention(const StepAttentionParams<T>& p, const DecodeLayersArgs& args,
                                  cudaStream_t stream) {
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
  attention.qkv = reinterpret_cast<const T*>(workspace + parts.qkv);
  attention.lengths = args.lengths;
  attention.kv_start = args.kv_start;
  attention.cache_rows = args.cache_rows;
  attention.key_rows = args.key_rows;
  attention.partials = reinterpret_cast<float*>(workspace + parts.partials);
  attention.arrivals = reinterpret_cast<unsigned*>(workspace);
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
  for (int64_t index = 0; index < args.num_layers && error == cudaSuccess; ++index) {
    const DecodeLayer& layer = args.layers[index];
    LinearArgs qkv = product(args, workspace + parts.qkv, hidden_states, hidden_size,
                             args.num_qkv_weights == 1 ? 3 * hidden_size : hidden_size);
    qkv.out_stride = 3 * hidden_size;
    qkv.num_weights = args.num_qkv_weights;
    for (int i = 0; i < args.num_qkv_weights; ++i) {
      qkv.weight[i] = layer.qkv_weight[i];
      qkv.bias[i] = layer.qkv_bias[i];
    }
    qkv.norm_weight = layer.norm1_weight;
    qkv.norm_bias = layer.norm1_bias;
    error = launch_linear<T>(qkv, stream, index > 0);

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
    if (error == cudaSuccess) error = launch_linear<T>(projection, stream, true);

    LinearArgs first =
        product(args, workspace + parts.inner, projection.out, hidden_size, args.intermediate_size);
    first.weight[0] = layer.fc1_weight;
    first.bias[0] = layer.fc1_bias;
    first.norm_weight = layer.norm2_weight;
    first.norm_bias = layer.norm2_bias;
    first.activation = args.activation;
    if (error == cudaSuccess) error = launch_linear<T>(first, stream, true);

    LinearArgs second = product(args, args.out, first.out, args.intermediate_size, hidden_size);
    second.weight[0] = layer.fc2_weight;
    second.bias[0] = layer.fc2_bias;
    second.residual = projection.out;
    if (error == cudaSuccess) error = launch_linear<T>(second, stream, true);
    hidden_states = args.out;
  }
  return error;
}

}  // namespace

int64_t decode_layers_workspace_bytes(const DecodeLayersArgs& args) {
  return workspace_parts(args).end;
}

Status decode_layers(const DecodeLayersArgs& args, const Context& context) {
  constexpr int64_t kMaxHeadDim = 256;
  if (args.rows > kMaxSkinnyRows || args.head_dim > kMaxHeadDim)
    return Status{Status::kUnsupported};
  if (args.rows == 0 || args.num_layers == 0) return Status{};
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_decode_layers<decltype(element)>(args, stream_of(context));
  }));
}

}  // namespace eet_patch::cuda
