// The argument of the attention kernels, and where a (batch row, head) finds its tokens.
#pragma once

#include <algorithm>

#include "common/attention_mask.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace eet_patch::cuda {

template <typename T>
struct AttentionParams {
  T* out;
  const T *query, *key, *value;
  HeadStrides out_strides, query_strides, key_strides, value_strides;
  AttentionMask mask;
  const int64_t *cu_seqlens, *kv_start;
  int q_len, kv_len, head_dim, num_heads,
      group_size;        // group_size: query heads of one key/value head
  bool causal, vectors;  // vectors: rows may be read and written 16 bytes at a time
  float scale;           // softmax_scale * log2(e): exp2 serves
};

template <typename T>
AttentionParams<T> attention_params(const AttentionArgs& args) {
  AttentionParams<T> p;
  p.out = static_cast<T*>(args.out);
  p.query = static_cast<const T*>(args.query);
  p.key = static_cast<const T*>(args.key);
  p.value = static_cast<const T*>(args.value);
  p.out_strides = args.out_strides;
  p.query_strides = args.query_strides;
  p.key_strides = args.key_strides;
  p.value_strides = args.value_strides;
  p.mask = args.mask;
  if (p.mask.data == nullptr) p.mask.kind = MaskKind::kNone;
  p.cu_seqlens = args.cu_seqlens;
  p.kv_start = args.kv_start;
  p.q_len = static_cast<int>(args.q_len);
  p.kv_len = static_cast<int>(args.kv_len);
  p.head_dim = static_cast<int>(args.head_dim);
  p.num_heads = static_cast<int>(args.num_heads);
  p.group_size = static_cast<int>(args.num_heads / args.num_kv_heads);
  p.causal = args.causal;
  p.scale = args.softmax_scale * kLog2E;
  p.vectors = args.head_dim % kVectorSize<T> == 0 && is_aligned(args.out) &&
              is_aligned(args.query) && is_aligned(args.key) && is_aligned(args.value);
  for (const HeadStrides* strides :
       {&args.out_strides, &args.query_strides, &args.key_strides, &args.value_strides}) {
    p.vectors = p.vectors && strides->batch % kVectorSize<T> == 0 &&
                strides->head % kVectorSize<T> == 0 && strides->token % kVectorSize<T> == 0;
  }
  return p;
}

// One (batch row, head) of the problem, for the block's queries from `first_query` on.
template <typename T>
struct AttentionSequence {
  T* out;
  const T *query, *key, *value;
  int q_len, kv_len, kv_begin,
      kv_end;  // keys outside [kv_begin, kv_end) are hidden from all queries of the block
  int64_t mask_base;

  __device__ __forceinline__ AttentionSequence(const AttentionParams<T>& p, int batch, int head,
                                               int first_query, int num_queries) {
    const int kv_head = head / p.group_size;
    q_len = p.q_len;
    kv_len = p.kv_len;
    int64_t query_token = 0, key_token = 0;
    int64_t row = batch;
    if (p.cu_seqlens != nullptr) {
      query_token = key_token = p.cu_seqlens[batch];
      q_len = kv_len = static_cast<int>(p.cu_seqlens[batch + 1] - query_token);
      row = 0;
    }
    out = p.out + row * p.out_strides.batch + head * p.out_strides.head +
          query_token * p.out_strides.token;
    query = p.query + row * p.query_strides.batch + head * p.query_strides.head +
            query_token * p.query_strides.token;
    key = p.key + row * p.key_strides.batch + kv_head * p.key_strides.head +
          key_token * p.key_strides.token;
    value = p.value + row * p.value_strides.batch + kv_head * p.value_strides.head +
            key_token * p.value_strides.token;
    kv_begin = p.kv_start != nullptr
                   ? max(0, static_cast<int>(min(p.kv_start[batch], int64_t(kv_len))))
                   : 0;
    kv_end = p.causal ? min(kv_len, first_query + num_queries + kv_len - q_len) : kv_len;
    mask_base = batch * p.mask.batch_stride + head * p.mask.head_stride;
  }

  // Scaled score in units of log2, or -inf where `query` may not see `key`.
  __device__ __forceinline__ float masked(const AttentionParams<T>& p, float score, int query_index,
                                          int key_index) const {
    const bool hidden = key_index < kv_begin || key_index >= kv_end ||
                        (p.causal && key_index > query_index + kv_len - q_len) ||
                        query_index >= q_len;
    if (hidden) return -INFINITY;
    score *= p.scale;
    if (p.mask.kind != MaskKind::kNone) {
      score += mask_term<T>(
          p.mask, mask_base + query_index * p.mask.query_stride + key_index * p.mask.key_stride);
    }
    return score;
  }

  // Whether keys [first_key, first_key + num_keys) need masked() for queries from first_query to
  // the q_len-th.
  __device__ __forceinline__ bool needs_mask(const AttentionParams<T>& p, int first_query,
                                             int first_key, int num_keys) const {
    return p.mask.kind != MaskKind::kNone || first_key < kv_begin ||
           first_key + num_keys > kv_end ||
           (p.causal && first_key + num_keys - 1 > first_query + kv_len - q_len);
  }
};

}  // namespace eet_patch::cuda
