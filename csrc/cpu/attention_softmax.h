// One (batch, head) of the attention as both its forms see it, and their shared softmax step.
#pragma once

#include "cpu/attention_mask.h"
#include "cpu/math.h"
#include "cpu/team_ops.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

constexpr int64_t kMaxHeadDim = 256;

// Addresses of one sequence and head, and the keys its queries may see.
template <typename T>
struct HeadView {
  const T *query, *key, *value;
  T* out;
  int64_t batch, head;
  int64_t q_len, key_begin, key_end;
  int64_t causal_offset;  // query i sees keys up to i + causal_offset
  bool causal;

  HeadView(const AttentionArgs& args, int64_t batch, int64_t head)
      : batch(batch), head(head), causal(args.causal) {
    const int64_t kv_head = head / (args.num_heads / args.num_kv_heads);
    const auto address = [&](const void* data, const HeadStrides& strides, int64_t head) {
      const int64_t row = args.cu_seqlens != nullptr ? args.cu_seqlens[batch] * strides.token
                                                     : batch * strides.batch;
      return static_cast<const T*>(data) + row + head * strides.head;
    };
    query = address(args.query, args.query_strides, head);
    key = address(args.key, args.key_strides, kv_head);
    value = address(args.value, args.value_strides, kv_head);
    out = const_cast<T*>(address(args.out, args.out_strides, head));
    key_begin = 0;
    if (args.cu_seqlens != nullptr) {
      q_len = key_end = args.cu_seqlens[batch + 1] - args.cu_seqlens[batch];
    } else {
      q_len = args.q_len;
      key_end = args.kv_len;
      if (args.kv_start != nullptr) key_begin = min64(max64(args.kv_start[batch], 0), key_end);
    }
    causal_offset = key_end - q_len;
  }

  // Keys that queries up to `query` see: [key_begin, key_limit(query)); the limit may lie below
  // key_begin.
  int64_t key_limit(int64_t query) const {
    return causal ? min64(key_end, query + causal_offset + 1) : key_end;
  }
};

struct RunningSoftmax {
  float maximum = -kInfinity, sum = 0.0f;
};

// Turns scores of `limit` consecutive keys into exp(score + term - maximum), 0 from limit up to
// `padded` (whole vectors): vector v goes to weights[v * stride]. Returns the factor that earlier
// sums must take, as the maximum may have grown (Milakov and Gimelshein 2018, arXiv:1805.02867).
inline float softmax_step(const float* scores, const float* terms, int64_t limit, int64_t padded,
                          float* weights, int64_t stride, RunningSoftmax* running) {
  float maximum = -kInfinity;
  if (limit > 0) {
    Vec highest = set1(-kInfinity);
    float* out = weights;
    for (int64_t j = 0; j < limit; j += kLanes, out += stride) {
      Vec x = load(scores + j);
      if (terms != nullptr) x = x + load(terms + j);
      if (limit - j < kLanes) x = select_first(x, limit - j, set1(-kInfinity));
      store(out, x);
      highest = max(highest, x);
    }
    maximum = reduce_max(highest);
  }
  maximum = maximum > running->maximum ? maximum : running->maximum;
  if (maximum == -kInfinity) {  // every key so far is excluded, or its score is NaN
    const float* kept = weights;
    for (int64_t first = 0; first < limit; first += kLanes, kept += stride) {
      for (int64_t j = 0; j < kLanes && first + j < limit; ++j) {
        if (kept[j] != kept[j]) running->sum = kept[j];
      }
    }
    for (int64_t j = 0; j < padded; j += kLanes, weights += stride) store(weights, zero());
    return 1.0f;
  }
  const Vec centre = set1(maximum);
  Vec sum = zero();
  int64_t j = 0;
  for (; j < limit; j += kLanes, weights += stride) {
    const Vec x = exp(load(weights) - centre);
    store(weights, x);
    sum = sum + x;
  }
  for (; j < padded; j += kLanes, weights += stride) store(weights, zero());
  float factor = 1.0f;
  if (maximum != running->maximum) {
    alignas(64) float lanes[kLanes];
    store(lanes, exp(set1(running->maximum - maximum)));
    factor = lanes[0];
  }
  running->sum = running->sum * factor + reduce_add(sum);
  running->maximum = maximum;
  return factor;
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
