// Attention of many queries in plain fp32 arithmetic: online softmax over blocks of keys
// (FlashAttention-2, Dao 2023, arXiv:2307.08691) in shared memory, no TF32.
#pragma once

#include "cuda/attention_params.cuh"

namespace eet_patch::cuda {

constexpr int kFmaThreads = 128;
constexpr int kFmaQueries = 32;
constexpr int kFmaRows = 2;     // queries of a thread
constexpr int kFmaColumns = 8;  // threads side by side on a query

template <int kHeadDim>
struct FmaTile {
  static constexpr int kKeys = kHeadDim > 128 ? 16 : 32;
  static constexpr int kStride = kHeadDim + 4;
  static constexpr int kProbabilityStride = kKeys + 1;
  static constexpr int kSharedBytes =
      4 * ((kFmaQueries + kKeys) * kStride + kFmaQueries * kProbabilityStride);
};

template <int kRows, int kHeadDim, int kStride>
__device__ __forceinline__ void load_rows(float* target, const float* source, int64_t token_stride,
                                          int first, int limit, int head_dim, bool vectors) {
  constexpr int kVectors = kHeadDim / 4;
  for (int i = threadIdx.x; i < kRows * kVectors; i += kFmaThreads) {
    const int row = i / kVectors, column = i % kVectors * 4;
    float4 packed = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first + row < limit) {
      const float* from = source + (first + row) * token_stride + column;
      if (vectors) {
        if (column < head_dim) packed = *reinterpret_cast<const float4*>(from);
      } else {
        if (column < head_dim) packed.x = from[0];
        if (column + 1 < head_dim) packed.y = from[1];
        if (column + 2 < head_dim) packed.z = from[2];
        if (column + 3 < head_dim) packed.w = from[3];
      }
    }
    *reinterpret_cast<float4*>(target + row * kStride + column) = packed;
  }
}

// A block owns 32 queries of one head; thread (y, x) of 16 x 8 two of them, every 8th key, and
// every 8th group of four output columns. Keys and then values of a block of kKeys pass through one
// buffer. head_dim <= kHeadDim, zero-padded.
template <int kHeadDim>
__global__ void __launch_bounds__(kFmaThreads)
    attention_fma_kernel(const AttentionParams<float> p) {
  using Tile = FmaTile<kHeadDim>;
  constexpr int kKeys = Tile::kKeys, kStride = Tile::kStride;
  constexpr int kThreadKeys = kKeys / kFmaColumns, kGroups = kHeadDim / (4 * kFmaColumns);
  extern __shared__ __align__(16) float shared_floats[];
  float* queries = shared_floats;
  float* buffer = queries + kFmaQueries * kStride;
  float* probabilities = buffer + kKeys * kStride;

  release_dependents();
  wait_for_predecessor();
  const int first_query = (gridDim.x - 1 - blockIdx.x) * kFmaQueries;
  const AttentionSequence<float> sequence(p, blockIdx.z, blockIdx.y, first_query, kFmaQueries);
  if (first_query >= sequence.q_len) return;
  const int x = threadIdx.x % kFmaColumns, y = threadIdx.x / kFmaColumns;
  load_rows<kFmaQueries, kHeadDim, kStride>(queries, sequence.query, p.query_strides.token,
                                            first_query, sequence.q_len, p.head_dim, p.vectors);

  float out[kFmaRows][kGroups][4] = {};
  float maximum[kFmaRows], total[kFmaRows];
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) maximum[r] = -INFINITY, total[r] = 0.0f;

  for (int first_key = sequence.kv_begin / kKeys * kKeys; first_key < sequence.kv_end;
       first_key += kKeys) {
    __syncthreads();
    load_rows<kKeys, kHeadDim, kStride>(buffer, sequence.key, p.key_strides.token, first_key,
                                        sequence.kv_len, p.head_dim, p.vectors);
    __syncthreads();
    float scores[kFmaRows][kThreadKeys] = {};
#pragma unroll 4
    for (int d = 0; d < kHeadDim; d += 4) {
      float4 a[kFmaRows];
#pragma unroll
      for (int r = 0; r < kFmaRows; ++r) {
        a[r] = *reinterpret_cast<const float4*>(queries + (y * kFmaRows + r) * kStride + d);
      }
#pragma unroll
      for (int k = 0; k < kThreadKeys; ++k) {
        const float4 b =
            *reinterpret_cast<const float4*>(buffer + (k * kFmaColumns + x) * kStride + d);
#pragma unroll
        for (int r = 0; r < kFmaRows; ++r) {
          scores[r][k] = fmaf(
              a[r].x, b.x, fmaf(a[r].y, b.y, fmaf(a[r].z, b.z, fmaf(a[r].w, b.w, scores[r][k]))));
        }
      }
    }

#pragma unroll
    for (int r = 0; r < kFmaRows; ++r) {
      const int row = y * kFmaRows + r;
      float highest = maximum[r];
#pragma unroll
      for (int k = 0; k < kThreadKeys; ++k) {
        scores[r][k] =
            sequence.masked(p, scores[r][k], first_query + row, first_key + k * kFmaColumns + x);
        highest = fmaxf(highest, scores[r][k]);
      }
      highest = warp_max<kFmaColumns>(highest);
      const float shift = highest == -INFINITY ? 0.0f : highest;
      const float correction = exp2_fast(maximum[r] - shift);
      maximum[r] = highest;
      total[r] *= correction;
#pragma unroll
      for (int k = 0; k < kThreadKeys; ++k) {
        const float probability = exp2_fast(scores[r][k] - shift);
        total[r] += probability;
        probabilities[row * Tile::kProbabilityStride + k * kFmaColumns + x] = probability;
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[r][group][i] *= correction;
      }
    }
    __syncthreads();
    load_rows<kKeys, kHeadDim, kStride>(buffer, sequence.value, p.value_strides.token, first_key,
                                        sequence.kv_len, p.head_dim, p.vectors);
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kKeys; ++k) {
      float probability[kFmaRows];
#pragma unroll
      for (int r = 0; r < kFmaRows; ++r)
        probability[r] = probabilities[(y * kFmaRows + r) * Tile::kProbabilityStride + k];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const float4 v =
            *reinterpret_cast<const float4*>(buffer + k * kStride + (group * kFmaColumns + x) * 4);
#pragma unroll
        for (int r = 0; r < kFmaRows; ++r) {
          out[r][group][0] = fmaf(probability[r], v.x, out[r][group][0]);
          out[r][group][1] = fmaf(probability[r], v.y, out[r][group][1]);
          out[r][group][2] = fmaf(probability[r], v.z, out[r][group][2]);
          out[r][group][3] = fmaf(probability[r], v.w, out[r][group][3]);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) {
    const float sum = warp_sum<kFmaColumns>(total[r]);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int row = first_query + y * kFmaRows + r;
    if (row >= sequence.q_len) continue;
    float* target = sequence.out + row * p.out_strides.token;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = (group * kFmaColumns + x) * 4 + i;
        if (column < p.head_dim) target[column] = out[r][group][i] * inverse;
      }
    }
  }
}

}  // namespace eet_patch::cuda
