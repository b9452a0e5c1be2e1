// Attention of many queries on tensor cores, for fp16 and bf16: online softmax over blocks of keys
// (FlashAttention-2, Dao 2023, arXiv:2307.08691). Scores and probabilities never leave registers.
#pragma once

#include "common/mma.cuh"
#include "cuda/attention_params.cuh"

namespace eet_patch::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionQueries = 16 * kAttentionWarps;

// Rows of [first, first + kRows) of a (token, head_dim) view to shared memory; rows from `limit` on
// and columns from head_dim on become zeros. Ends with a commit.
template <typename T, int kRows, int kHeadDim, int kStride>
__device__ __forceinline__ void copy_rows(T* target, const T* source, int64_t token_stride,
                                          int first, int limit, int head_dim, bool vectors) {
  constexpr int kThreads = kAttentionWarps * kWarpSize;
  if (vectors) {
    constexpr int kVector = kVectorSize<T>, kVectors = kHeadDim / kVector;
    constexpr int kPassRows =
        kThreads / kVectors;  // the last threads rest where a row's vectors don't divide them
    const int first_row = threadIdx.x / kVectors, column = threadIdx.x % kVectors * kVector;
    const T* from = source + (first + first_row) * token_stride + column;
    T* to = target + first_row * kStride + column;
    const bool inside = column < head_dim && first_row < kPassRows;
#pragma unroll
    for (int row = 0; row < kRows; row += kPassRows) {
      const bool valid = inside && first + first_row + row < limit;
      if (first_row < kPassRows && first_row + row < kRows)
        copy_async_16(to, valid ? from : source, valid);
      from += kPassRows * token_stride;
      to += kPassRows * kStride;
    }
  } else {
    for (int i = threadIdx.x; i < kRows * kHeadDim; i += kThreads) {
      const int row = i / kHeadDim, column = i % kHeadDim;
      const bool valid = first + row < limit && column < head_dim;
      target[row * kStride + column] =
          valid ? source[(first + row) * token_stride + column] : from_float<T>(0.0f);
    }
  }
  copy_async_commit();
}

template <typename T>
__device__ __forceinline__ uint32_t rounding_rest(uint32_t rounded, float first, float second) {
  const float2 kept = unpack2<T>(rounded);
  return pack2<T>(first - kept.x, second - kept.y);
}

// A block owns 64 queries of one head, a warp 16 of them; keys go by in blocks of kKeys, K and V
// each through its own buffer, the next K under way during the second product and V during the
// first. head_dim <= kHeadDim, zero-padded. Reads queries once, keys and values once per 64
// queries; writes every output row, zeros where no key is visible.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttentionWarps* kWarpSize)
    attention_mma_kernel(const AttentionParams<T> p) {
  constexpr int kKeys = kHeadDim > 128 ? 32 : 64;
  constexpr int kStride =
      kHeadDim + 8;  // an odd number of 16-byte units: ldmatrix meets no bank twice
  constexpr int kSteps = kHeadDim / 16, kKeyGroups = kKeys / 8, kOutGroups = kHeadDim / 8;
  // The queries pass through the value buffer while the first keys come, or through both buffers.
  constexpr bool kKeysEarly = kKeys >= kAttentionQueries;
  static_assert(2 * kKeys >= kAttentionQueries, "the queries must fit the key and value buffers");
  __shared__ __align__(16) T shared[2 * kKeys * kStride];
  T *keys = shared, *values = shared + kKeys * kStride;

  release_dependents();
  wait_for_predecessor();
  const int first_query =
      (gridDim.x - 1 - blockIdx.x) * kAttentionQueries;  // the longest causal rows start first
  const AttentionSequence<T> sequence(p, blockIdx.z, blockIdx.y, first_query, kAttentionQueries);
  if (first_query >= sequence.q_len) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4,
            q = lane % 4;
  const int query = first_query + warp * 16 + g;  // this lane's rows: query and query + 8

  int first_key = sequence.kv_begin / kKeys * kKeys;
  T* queries = kKeysEarly ? values : shared;
  copy_rows<T, kAttentionQueries, kHeadDim, kStride>(queries, sequence.query, p.query_strides.token,
                                                     first_query, sequence.q_len, p.head_dim,
                                                     p.vectors);
  auto copy_first_keys = [&] {
    copy_rows<T, kKeys, kHeadDim, kStride>(keys, sequence.key, p.key_strides.token, first_key,
                                           sequence.kv_len, p.head_dim, p.vectors);
  };
  if (kKeysEarly) copy_first_keys();
  copy_async_wait<kKeysEarly ? 1 : 0>();
  __syncthreads();
  uint32_t query_fragments[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ldmatrix_x4(query_fragments[step],
                queries + (warp * 16 + lane % 16) * kStride + step * 16 + lane / 16 * 8);
  }
  if (!kKeysEarly) {
    __syncthreads();
    copy_first_keys();
  }

  float out[kOutGroups][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  for (; first_key < sequence.kv_end; first_key += kKeys) {
    copy_async_wait<0>();
    __syncthreads();  // the keys are here, and the queries or the last block's values are no longer
                      // read
    copy_rows<T, kKeys, kHeadDim, kStride>(values, sequence.value, p.value_strides.token, first_key,
                                           sequence.kv_len, p.head_dim, p.vectors);

    float scores[kKeyGroups][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int pair = 0; pair < kKeyGroups / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, keys + (pair * 16 + lane / 16 * 8 + lane % 8) * kStride + step * 16 +
                           lane / 8 % 2 * 8);
        const uint32_t* a = query_fragments[step];
        mma_m16n8k16<T>(scores[2 * pair], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_m16n8k16<T>(scores[2 * pair + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }

    float multiplier = p.scale;  // what takes a score to units of log2
    if (p.scale <= 0.0f || sequence.needs_mask(p, first_query, first_key, kKeys)) {
      multiplier = 1.0f;
#pragma unroll
      for (int group = 0; group < kKeyGroups; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[group][i] = sequence.masked(p, scores[group][i], query + i / 2 * 8,
                                             first_key + group * 8 + 2 * q + i % 2);
        }
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int group = 0; group < kKeyGroups; ++group) {
        highest = fmaxf(highest, fmaxf(scores[group][2 * half], scores[group][2 * half + 1]));
      }
      highest = fmaxf(maximum[half], warp_max<4>(highest) * multiplier);
      const float shift =
          highest == -INFINITY ? 0.0f : highest;  // no visible key yet: exp2(-inf - 0) = 0, not NaN
      const float correction = exp2_fast(maximum[half] - shift);
      maximum[half] = highest;
      float sum = 0.0f;
#pragma unroll
      for (int group = 0; group < kKeyGroups; ++group) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[group][i] = exp2_fast(fmaf(scores[group][i], multiplier, -shift));
          sum += scores[group][i];
        }
      }
      total[half] =
          total[half] * correction + sum;  // of this lane's columns; lanes meet at the end
#pragma unroll
      for (int group = 0; group < kOutGroups; ++group) {
        out[group][2 * half] *= correction;
        out[group][2 * half + 1] *= correction;
      }
    }

    copy_async_wait<0>();
    __syncthreads();  // the values are here, and the keys are no longer read
    if (first_key + kKeys < sequence.kv_end) {
      copy_rows<T, kKeys, kHeadDim, kStride>(keys, sequence.key, p.key_strides.token,
                                             first_key + kKeys, sequence.kv_len, p.head_dim,
                                             p.vectors);
    }
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const uint32_t a0 = pack2<T>(scores[2 * step][0], scores[2 * step][1]);
      const uint32_t a1 = pack2<T>(scores[2 * step][2], scores[2 * step][3]);
      const uint32_t a2 = pack2<T>(scores[2 * step + 1][0], scores[2 * step + 1][1]);
      const uint32_t a3 = pack2<T>(scores[2 * step + 1][2], scores[2 * step + 1][3]);
      // What rounding took from the probabilities is multiplied too where PyTorch has only its fp32
      // path to compare with.
      uint32_t rest[4] = {};
      if (!p.vectors) {
        rest[0] = rounding_rest<T>(a0, scores[2 * step][0], scores[2 * step][1]);
        rest[1] = rounding_rest<T>(a1, scores[2 * step][2], scores[2 * step][3]);
        rest[2] = rounding_rest<T>(a2, scores[2 * step + 1][0], scores[2 * step + 1][1]);
        rest[3] = rounding_rest<T>(a3, scores[2 * step + 1][2], scores[2 * step + 1][3]);
      }
#pragma unroll
      for (int pair = 0; pair < kOutGroups / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4_trans(b,
                          values + (step * 16 + lane % 16) * kStride + pair * 16 + lane / 16 * 8);
        mma_m16n8k16<T>(out[2 * pair], a0, a1, a2, a3, b[0], b[1]);
        mma_m16n8k16<T>(out[2 * pair + 1], a0, a1, a2, a3, b[2], b[3]);
        if (!p.vectors) {
          mma_m16n8k16<T>(out[2 * pair], rest[0], rest[1], rest[2], rest[3], b[0], b[1]);
          mma_m16n8k16<T>(out[2 * pair + 1], rest[0], rest[1], rest[2], rest[3], b[2], b[3]);
        }
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = warp_sum<4>(total[half]);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int row = query + half * 8;
    if (row >= sequence.q_len) continue;
    T* target = sequence.out + row * p.out_strides.token;
#pragma unroll
    for (int group = 0; group < kOutGroups; ++group) {
      const int column = group * 8 + 2 * q;
      const float first = out[group][2 * half] * inverse,
                  second = out[group][2 * half + 1] * inverse;
      if (p.vectors) {
        if (column < p.head_dim)
          *reinterpret_cast<uint32_t*>(target + column) = pack2<T>(first, second);
      } else {
        if (column < p.head_dim) target[column] = from_float<T>(first);
        if (column + 1 < p.head_dim) target[column + 1] = from_float<T>(second);
      }
    }
  }
}

}  // namespace eet_patch::cuda
