// Attention of one new token of every row over keys wherever they stand in the cache, and the mean
// of its weights over the heads. A thread owns whole (row, head) pairs, for the weights whole rows.
#include "cpu/attention_softmax.h"
#include "cpu/pack.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

constexpr int64_t kBlockKeys = 128;

struct KeyRange {
  int64_t begin, end;  // the last one is the new token where the row appends it
};

KeyRange key_range(const StepAttentionArgs& args, int64_t row) {
  const int64_t end = args.lengths[row];
  const int64_t start = args.kv_start != nullptr ? args.kv_start[row] : 0;
  return {min64(max64(start, 0), end), args.appends ? end + 1 : end};
}

int64_t own_cache_row(const StepAttentionArgs& args, int64_t row) {
  return args.cache_rows != nullptr ? args.cache_rows[row] : row;
}

// Where `count` keys of a head from `first` on stand.
void find_keys(const StepAttentionArgs& args, int64_t row, int64_t head, int64_t first,
               int64_t count, int64_t* offsets) {
  const int64_t own = own_cache_row(args, row), length = args.lengths[row];
  for (int64_t j = 0; j < count; ++j) {
    const int64_t key = first + j;
    const int64_t from =
        args.key_rows != nullptr && key < length ? args.key_rows[row * args.capacity + key] : own;
    offsets[j] = from * args.cache_strides.batch + head * args.cache_strides.head +
                 key * args.cache_strides.token;
  }
}

template <typename T>
void score_keys(float* scores, const float* query, const T* keys, const int64_t* offsets,
                int64_t count, int64_t head_dim) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    Vec acc[4] = {zero(), zero(), zero(), zero()};
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const Vec q = load(query + d);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u)
        acc[u] = fma(q, load_upto(keys + offsets[j + u] + d, head_dim - d), acc[u]);
    }
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) scores[j + u] = reduce_add(acc[u]);
  }
  for (; j < count; ++j) {
    Vec acc = zero();
    for (int64_t d = 0; d < head_dim; d += kLanes)
      acc = fma(load(query + d), load_upto(keys + offsets[j] + d, head_dim - d), acc);
    scores[j] = reduce_add(acc);
  }
}

template <typename T>
void load_query(const StepAttentionArgs& args, int64_t row, int64_t head, float* query) {
  const T* source =
      static_cast<const T*>(args.query) + row * args.query_stride + head * args.head_dim;
  pack_row(query, kLanes, source, args.head_dim, args.softmax_scale);
}

template <typename T>
void attend(const StepAttentionArgs& args, int64_t row, int64_t head) {
  alignas(64) float query[kMaxHeadDim + kLanes], out[kMaxHeadDim + kLanes];
  alignas(64) float scores[kBlockKeys + kLanes];
  int64_t offsets[kBlockKeys];
  const int64_t head_dim = args.head_dim;
  load_query<T>(args, row, head, query);
  for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, zero());
  const T* keys = static_cast<const T*>(args.key_cache);
  const T* values = static_cast<const T*>(args.value_cache);
  const KeyRange range = key_range(args, row);
  RunningSoftmax running;
  for (int64_t first = range.begin; first < range.end; first += kBlockKeys) {
    const int64_t count = min64(kBlockKeys, range.end - first);
    find_keys(args, row, head, first, count, offsets);
    score_keys(scores, query, keys, offsets, count, head_dim);
    const float factor =
        softmax_step(scores, nullptr, count, round_up(count, kLanes), scores, kLanes, &running);
    for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
      const int64_t rest = head_dim - d, second = rest - kLanes;
      Vec acc[2] = {load(out + d) * set1(factor), zero()};
      if (second > 0) acc[1] = load(out + d + kLanes) * set1(factor);
      for (int64_t j = 0; j < count; ++j) {
        const Vec weight = set1(scores[j]);
        const T* value = values + offsets[j] + d;
        acc[0] = fma(weight, load_upto(value, rest), acc[0]);
        if (second > 0) acc[1] = fma(weight, load_upto(value + kLanes, second), acc[1]);
      }
      store(out + d, acc[0]);
      if (second > 0) store(out + d + kLanes, acc[1]);
    }
  }
  T* target = static_cast<T*>(args.out) + (row * args.num_heads + head) * head_dim;
  const Vec scale = set1(running.sum == 0.0f ? 0.0f : 1.0f / running.sum);
  for (int64_t d = 0; d < head_dim; d += kLanes)
    store_upto(target + d, load(out + d) * scale, head_dim - d);
}

template <typename T>
void write_new(const StepAttentionArgs& args, int64_t row, int64_t head) {
  const T* source =
      static_cast<const T*>(args.query) + row * args.query_stride + head * args.head_dim;
  const int64_t target = own_cache_row(args, row) * args.cache_strides.batch +
                         head * args.cache_strides.head +
                         args.lengths[row] * args.cache_strides.token;
  const size_t size = size_t(args.head_dim) * sizeof(T);
  std::memcpy(static_cast<T*>(args.key_cache) + target, source + args.key_offset, size);
  std::memcpy(static_cast<T*>(args.value_cache) + target, source + args.value_offset, size);
}

template <typename T>
void mean_weights(const StepAttentionArgs& args, int64_t row) {
  alignas(64) float query[kMaxHeadDim + kLanes];
  int64_t offsets[kBlockKeys];
  const KeyRange range = key_range(args, row);
  const int64_t count = max64(range.end - range.begin, 0);
  float* scores = static_cast<float*>(
      thread_scratch(ScratchSlot::kAttention, (count + kLanes) * int64_t(sizeof(float))));
  const int64_t at =
      (args.weight_rows != nullptr ? args.weight_rows[row] : row) * args.weight_row_stride +
      (args.weight_positions != nullptr ? args.weight_positions[row] : 0) *
          args.weight_position_stride;
  float* target = args.weights + at;
  std::memset(target, 0, size_t(args.num_weights) * sizeof(float));
  if (count == 0) return;
  const float share = 1.0f / float(args.num_heads);
  for (int64_t head = 0; head < args.num_heads; ++head) {
    load_query<T>(args, row, head, query);
    for (int64_t first = 0; first < count; first += kBlockKeys) {
      const int64_t size = min64(kBlockKeys, count - first);
      find_keys(args, row, head, range.begin + first, size, offsets);
      score_keys(scores + first, query, static_cast<const T*>(args.key_cache), offsets, size,
                 args.head_dim);
    }
    RunningSoftmax running;
    softmax_step(scores, nullptr, count, round_up(count, kLanes), scores, kLanes, &running);
    const float scale = share / running.sum;
    for (int64_t j = 0; j < count; ++j) target[range.begin + j] += scale * scores[j];
  }
}

template <typename T>
void step_attention_share(const Team& team, const StepAttentionArgs& args) {
  const Range units = team.share(args.rows * args.num_heads);
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t row = unit / args.num_heads, head = unit % args.num_heads;
    // No other thread reads what is new here: it is of this row and head alone.
    if (args.appends) write_new<T>(args, row, head);
    attend<T>(args, row, head);
  }
  if (args.weights == nullptr) return;
  const Range rows = team.share(args.rows);
  for (int64_t row = rows.begin; row < rows.end; ++row) mean_weights<T>(args, row);
}

}  // namespace

Status step_attention(const StepAttentionArgs& args, const Context& context) {
  Status status;
  if (args.head_dim > kMaxHeadDim) {
    status.code = Status::kUnsupported;
    return status;
  }
  int64_t keys = 0;
  for (int64_t row = 0; row < args.rows; ++row) keys += args.lengths[row] + 1;
  parallel(threads_for(keys * args.num_heads * args.head_dim / 2, context), [&](const Team& team) {
    for_dtype(args.dtype,
              [&](auto element) { step_attention_share<decltype(element)>(team, args); });
  });
  return status;
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
