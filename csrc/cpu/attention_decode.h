// Attention of one query at a time, for few queries a head (decoding): keys and values are read
// once, unpacked, in blocks whose scores stay in L1. Memory-bound: kv_len * head_dim elements of
// keys and of values.
#pragma once

#include "cpu/attention_softmax.h"
#include "cpu/pack.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

constexpr int64_t kDecodeKeys = 128;

// scores[j] = query . key j. Four keys at a time: independent sums, one load of the query for all.
template <typename T>
inline void decode_scores(float* scores, const float* query, const T* key, int64_t stride,
                          int64_t count, int64_t head_dim) {
  const int64_t whole = head_dim / kLanes * kLanes, rest = head_dim - whole;
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const T* k = key + j * stride;
    Vec acc[4] = {zero(), zero(), zero(), zero()};
    for (int64_t d = 0; d < whole; d += kLanes) {
      const Vec q = load(query + d);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) acc[u] = fma(q, load(k + u * stride + d), acc[u]);
    }
    if (rest > 0) {
      const Vec q = load(query + whole);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u)
        acc[u] = fma(q, load_partial(k + u * stride + whole, rest), acc[u]);
    }
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) scores[j + u] = reduce_add(acc[u]);
  }
  for (; j < count; ++j) {
    Vec acc = zero();
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      acc = fma(load(query + d), load_upto(key + j * stride + d, head_dim - d), acc);
    }
    scores[j] = reduce_add(acc);
  }
}

// out[d] = factor * out[d] + sum over keys of weights[j] * value j [d], for NV vectors of d of
// which the last has `last` lanes. Two sets of accumulators hide the latency of the multiply-adds.
template <typename T, int NV>
inline void decode_values(float* out, const float* weights, const T* value, int64_t stride,
                          int64_t count, int64_t last, float factor) {
  Vec acc[2][NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    acc[0][v] = load(out + v * kLanes) * set1(factor);
    acc[1][v] = zero();
  }
  const auto add = [&](Vec(&sums)[NV], int64_t j) {
    const Vec w = set1(weights[j]);
    const T* row = value + j * stride;
#pragma GCC unroll 4
    for (int v = 0; v + 1 < NV; ++v) sums[v] = fma(w, load(row + v * kLanes), sums[v]);
    sums[NV - 1] = fma(w, load_upto(row + (NV - 1) * kLanes, last), sums[NV - 1]);
  };
  int64_t j = 0;
  for (; j + 2 <= count; j += 2) {
    add(acc[0], j);
    add(acc[1], j + 1);
  }
  if (j < count) add(acc[0], j);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) store(out + v * kLanes, acc[0][v] + acc[1][v]);
}

template <typename T>
void decode_query(const AttentionArgs& args, const HeadView<T>& view, int64_t q) {
  alignas(64) float query[kMaxHeadDim + kLanes], out[kMaxHeadDim + kLanes];
  alignas(64) float scores[kDecodeKeys + kLanes], terms[kDecodeKeys + kLanes];
  const int64_t head_dim = args.head_dim;
  pack_row(query, kLanes, view.query + q * args.query_strides.token, head_dim, args.softmax_scale);
  for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, zero());

  RunningSoftmax running;
  const int64_t end = view.key_limit(q);
  for (int64_t key = view.key_begin; key < end; key += kDecodeKeys) {
    const int64_t count = min64(kDecodeKeys, end - key);
    const bool masked = args.mask.kind != MaskKind::kNone;
    if (masked) mask_terms<T>(terms, args.mask, view.batch, view.head, q, key, count);
    decode_scores(scores, query, view.key + key * args.key_strides.token, args.key_strides.token,
                  count, head_dim);
    const float factor = softmax_step(scores, masked ? terms : nullptr, count,
                                      round_up(count, kLanes), scores, kLanes, &running);
    if (running.sum == 0.0f) continue;  // nothing visible yet: don't touch the values
    const T* value = view.value + key * args.value_strides.token;
    int64_t d = 0;
    for (; head_dim - d > 3 * kLanes; d += 4 * kLanes) {
      decode_values<T, 4>(out + d, scores, value + d, args.value_strides.token, count,
                          head_dim - d - 3 * kLanes, factor);
    }
    const int64_t rest = head_dim - d;
    if (rest > 2 * kLanes) {
      decode_values<T, 3>(out + d, scores, value + d, args.value_strides.token, count,
                          rest - 2 * kLanes, factor);
    } else if (rest > kLanes) {
      decode_values<T, 2>(out + d, scores, value + d, args.value_strides.token, count,
                          rest - kLanes, factor);
    } else if (rest > 0) {
      decode_values<T, 1>(out + d, scores, value + d, args.value_strides.token, count, rest,
                          factor);
    }
  }
  T* row = view.out + q * args.out_strides.token;
  const Vec scale = set1(running.sum == 0.0f ? 0.0f : 1.0f / running.sum);
  for (int64_t d = 0; d < head_dim; d += kLanes)
    store_upto(row + d, load(out + d) * scale, head_dim - d);
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
