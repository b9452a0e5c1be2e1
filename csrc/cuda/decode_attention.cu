// Attention of one new query a sequence against its cache (q_len = 1). The keys are split over
// blocks (Flash-Decoding, Dao et al. 2023,
// https://crfm.stanford.edu/2023/10/12/flashdecoding.html); each block leaves its maximum, its sum
// and its weighted values, and a second kernel adds them in the order of the splits, so that two
// runs give the same bits.
#include "cuda/attention_params.cuh"
#include "cuda/launchers.h"

namespace eet_patch::cuda {
namespace {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / kWarpSize;
constexpr int kMinSplitKeys = 128;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kPartialExtra = 2;  // maximum and sum, after the head_dim weighted values

int decode_splits(const AttentionArgs& args) {
  const int64_t pairs = std::max<int64_t>(1, args.batch * args.num_heads);
  const int64_t blocks =
      int64_t(kBlocksPerMultiprocessor) * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t splits = std::min(ceil_div(blocks, pairs), ceil_div(args.kv_len, kMinSplitKeys));
  return static_cast<int>(std::max<int64_t>(1, splits));
}

// kVector elements from an address that may not be aligned, and may end early.
template <typename T>
__device__ __forceinline__ uint4 load_piece(const T* source, int count, bool vectors) {
  uint4 packed = make_uint4(0, 0, 0, 0);
  if (count <= 0) return packed;
  if (vectors) return load_cache(source);
  Vector<T, kVectorSize<T>> elements;
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i)
    elements.data[i] = i < count ? source[i] : from_float<T>(0.0f);
  return reinterpret_cast<const uint4&>(elements);
}

// A block owns one split of the keys of one query head. kLanes lanes own a key at a time, each
// kPieces 16-byte pieces of it (head_dim <= kLanes * kPieces * kVector, zero-padded), with a
// running softmax of their own; kUnroll keys are under way at once. Groups meet by shuffles, warps
// in shared memory. Reads K and V once a query head.
template <typename T, int kLanes, int kPieces>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_attention_kernel(const AttentionParams<T> p, float* partials, int split_keys) {
  constexpr int kVector = kVectorSize<T>;
  constexpr int kGroups = kDecodeThreads / kLanes;
  constexpr int kUnroll = kPieces == 1 ? 4 : kPieces <= 3 ? 2 : 1;
  constexpr int kHeadDim = kLanes * kPieces * kVector;
  __shared__ float warp_out[kDecodeWarps][kHeadDim], warp_maximum[kDecodeWarps],
      warp_total[kDecodeWarps];

  release_dependents();
  wait_for_predecessor();
  const int head = blockIdx.y, batch = blockIdx.z, split = blockIdx.x;
  const AttentionSequence<T> sequence(p, batch, head, 0, 1);
  const int begin = max(split * split_keys, sequence.kv_begin),
            end = min((split + 1) * split_keys, sequence.kv_end);
  const int group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;

  float query[kPieces][kVector], out[kPieces][kVector] = {};
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int column = (piece * kLanes + lane) * kVector;
    unpack_vector<T>(load_piece(sequence.query + column, p.head_dim - column, p.vectors),
                     query[piece]);
  }
  float maximum = -INFINITY, total = 0.0f;

  for (int first = begin; first < end; first += kGroups * kUnroll) {
    uint4 keys[kUnroll][kPieces], values[kUnroll][kPieces];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int key = first + u * kGroups + group;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int column = (piece * kLanes + lane) * kVector,
                  count = key < end ? p.head_dim - column : 0;
        keys[u][piece] =
            load_piece(sequence.key + key * p.key_strides.token + column, count, p.vectors);
        values[u][piece] =
            load_piece(sequence.value + key * p.value_strides.token + column, count, p.vectors);
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
        unpack_vector<T>(keys[u][piece], key);
#pragma unroll
        for (int i = 0; i < kVector; ++i) score = fmaf(query[piece][i], key[i], score);
      }
      const int key = first + u * kGroups + group;
      score = warp_sum<kLanes>(score);
      scores[u] = key < end ? sequence.masked(p, score, 0, key) : -INFINITY;
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
        unpack_vector<T>(values[u][piece], value);
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
  for (int w = 0; w < kDecodeWarps; ++w) highest = fmaxf(highest, warp_maximum[w]);
  const float shift = highest == -INFINITY ? 0.0f : highest;
  float weights[kDecodeWarps];
  total = 0.0f;
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) {
    weights[w] = exp2_fast(warp_maximum[w] - shift);
    total += weights[w] * warp_total[w];
  }
  float* partial = partials + ((int64_t(batch) * p.num_heads + head) * gridDim.x + split) *
                                  (p.head_dim + kPartialExtra);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int column = threadIdx.x; column < p.head_dim; column += kDecodeThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) sum += weights[w] * warp_out[w][column];
    if (gridDim.x == 1) {
      sequence.out[column] = from_float<T>(sum * inverse);
    } else {
      partial[column] = sum;
    }
  }
  if (gridDim.x > 1 && threadIdx.x == 0) {
    partial[p.head_dim] = highest;
    partial[p.head_dim + 1] = total;
  }
}

// A block adds the splits of one (batch row, head), a thread a column.
template <typename T>
__global__ void __launch_bounds__(kDecodeThreads)
    combine_splits_kernel(const AttentionParams<T> p, const float* partials, int splits) {
  release_dependents();
  wait_for_predecessor();
  const int head = blockIdx.x, batch = blockIdx.y, stride = p.head_dim + kPartialExtra;
  const float* first = partials + (int64_t(batch) * p.num_heads + head) * splits * stride;
  float highest = -INFINITY;
  for (int split = 0; split < splits; ++split)
    highest = fmaxf(highest, first[split * stride + p.head_dim]);
  const float shift = highest == -INFINITY ? 0.0f : highest;
  T* out = p.out + batch * p.out_strides.batch + head * p.out_strides.head;
  for (int column = threadIdx.x; column < p.head_dim; column += kDecodeThreads) {
    float sum = 0.0f, total = 0.0f;
    for (int split = 0; split < splits; ++split) {
      const float* partial = first + split * stride;
      const float weight = exp2_fast(partial[p.head_dim] - shift);
      sum += weight * partial[column];
      total += weight * partial[p.head_dim + 1];
    }
    out[column] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
  }
}

template <typename T, int kLanes, int kPieces>
cudaError_t launch_splits(const AttentionArgs& args, cudaStream_t stream, bool chained) {
  static_assert(kLanes <= kWarpSize, "a key's lanes share a warp");
  const AttentionParams<T> p = attention_params<T>(args);
  int splits = decode_splits(args);
  if (splits > 1 && (args.workspace == nullptr ||
                     args.workspace_bytes < decode_attention_workspace_bytes(args))) {
    return cudaErrorInvalidValue;
  }
  const int split_keys = std::max(1, static_cast<int>(ceil_div(args.kv_len, splits)));
  float* partials = static_cast<float*>(args.workspace);
  LaunchConfig config;
  config.stream = stream;
  config.chained = chained;
  config.block = dim3(kDecodeThreads);
  config.grid = dim3(static_cast<unsigned>(splits), static_cast<unsigned>(args.num_heads),
                     static_cast<unsigned>(args.batch));
  const cudaError_t error =
      launch(config, decode_attention_kernel<T, kLanes, kPieces>, p, partials, split_keys);
  if (error != cudaSuccess || splits == 1) return error;
  config.chained = true;
  config.grid = dim3(static_cast<unsigned>(args.num_heads), static_cast<unsigned>(args.batch));
  return launch(config, combine_splits_kernel<T>, p, static_cast<const float*>(partials), splits);
}

}  // namespace

bool takes_decode_attention(const AttentionArgs& args) {
  return args.q_len == 1 && args.cu_seqlens == nullptr;
}

int64_t decode_attention_workspace_bytes(const AttentionArgs& args) {
  const int splits = decode_splits(args);
  return splits == 1 ? 0
                     : args.batch * args.num_heads * splits * (args.head_dim + kPartialExtra) *
                           int64_t(sizeof(float));
}

template <typename T>
cudaError_t launch_decode_attention(const AttentionArgs& args, cudaStream_t stream, bool chained) {
  constexpr int64_t kMaxGridYZ = 65535;
  if (args.batch > kMaxGridYZ || args.num_heads > kMaxGridYZ || args.head_dim > 256)
    return cudaErrorInvalidValue;
  constexpr int kWide =
      sizeof(T) == 4 ? 2 : 1;  // fp32 keys take twice the lanes, or pieces where lanes run out
  if (args.head_dim <= 32) return launch_splits<T, 4 * kWide, 1>(args, stream, chained);
  if (args.head_dim <= 64) return launch_splits<T, 8 * kWide, 1>(args, stream, chained);
  if (args.head_dim <= 80) return launch_splits<T, 2 * kWide, 5>(args, stream, chained);
  if (args.head_dim <= 96) return launch_splits<T, 4 * kWide, 3>(args, stream, chained);
  if (args.head_dim <= 128) return launch_splits<T, 16 * kWide, 1>(args, stream, chained);
  if (args.head_dim <= 192) return launch_splits<T, 8 * kWide, 3>(args, stream, chained);
  return launch_splits<T, 32, kWide>(args, stream, chained);
}

template cudaError_t launch_decode_attention<float>(const AttentionArgs&, cudaStream_t, bool);
template cudaError_t launch_decode_attention<__half>(const AttentionArgs&, cudaStream_t, bool);
template cudaError_t launch_decode_attention<__nv_bfloat16>(const AttentionArgs&, cudaStream_t,
                                                            bool);

}  // namespace eet_patch::cuda
