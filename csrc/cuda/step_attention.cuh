// Attention of one new token of every row over its cached past, split over the keys
// (Flash-Decoding, Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The
// blocks of a head form a cluster: each leaves its part in the shared memory of the first, which
// adds them in their order, so that two runs give the same bits. The past is on its way before the
// kernel ahead, which makes query, key and value of the new token, has ended.
#pragma once

#include "common/attention_mask.cuh"
#include "common/bulk_copy.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace eet_patch::cuda {

constexpr int kStepThreads = 128;
constexpr int kStepWarps = kStepThreads / kWarpSize;

template <typename T>
struct StepAttentionParams {
  T* out;        // (rows, hidden_size)
  const T* qkv;  // (rows, 3 * hidden_size); where the past alone is seen, queries
  int64_t query_stride, key_offset, value_offset;  // of rows; from query to new key, to new value
  bool past_only;                                  // no row has a new key
  bool starts_alone;  // for the launcher: what is ahead is not of the same call
  T *key_cache, *value_cache;
  const int32_t *lengths, *kv_start, *cache_rows, *key_rows;
  HeadStrides strides;
  int64_t capacity;
  int num_heads, head_dim;
  int shared_rows;  // so many rows behind each other have one length and start, and share keys
  bool vectors;     // rows may be read and written 16 bytes at a time
  float scale;      // softmax_scale * log2(e): exp2 serves
};

// One split of the keys (blockIdx.x, also the rank in the cluster) of one head (y) of one row (z).
// The past is divided evenly over the splits at whatever length the row has; the last one in use
// adds the new token, if there is one.
template <typename T>
struct StepSplit {
  int index, count, head, row;
  int length, used;  // keys there already; splits that have keys
  int begin, end;    // keys of this one
  const int32_t* key_rows;
  int64_t head_offset, own_row;

  __device__ __forceinline__ explicit StepSplit(const StepAttentionParams<T>& p)
      : StepSplit(p, blockIdx.y, blockIdx.x, gridDim.x) {}
  __device__ __forceinline__ StepSplit(const StepAttentionParams<T>& p, int head, int index,
                                       int count)
      : index(index), count(count), head(head), row(blockIdx.z) {
    constexpr int kRound = 16;
    length = p.lengths[row];
    const int start = p.kv_start != nullptr ? max(0, min(p.kv_start[row], length)) : 0;
    const int past = length - start;
    const int keys = ((past + count - 1) / count + kRound - 1) / kRound * kRound;
    used = past == 0 ? 1 : (past + keys - 1) / keys;
    begin = start + index * keys;
    end = min(begin + keys, length);
    const int cache_row = p.cache_rows != nullptr ? p.cache_rows[row] : row;
    key_rows = p.key_rows != nullptr ? p.key_rows + row * p.capacity : nullptr;
    head_offset = head * p.strides.head;
    own_row = cache_row * p.strides.batch + head_offset;
  }
  // Where a key that is there already stands.
  __device__ __forceinline__ int64_t at(const StepAttentionParams<T>& p, int key) const {
    return (key_rows != nullptr ? key_rows[key] * p.strides.batch + head_offset : own_row) +
           key * p.strides.token;
  }
  // Sets up the barrier of the first split, which the others push their parts to.
  __device__ __forceinline__ void expect(uint64_t* arrived, int head_dim) const {
    if (count > 1 && threadIdx.x == 0) {
      barrier_init(shared_address(arrived), 1);
      barrier_init_fence();
      barrier_expect(shared_address(arrived), used * (head_dim + 2) * 4);
    }
    __syncwarp();
  }
};

// Adds the parts of the block's warps, then those of the splits, each in their order.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void finish_step_attention(
    const StepAttentionParams<T>& p, const StepSplit<T>& split,
    const float (&warp_out)[kWarps][kHeadDim], const float (&warp_maximum)[kWarps],
    const float (&warp_total)[kWarps], float (&split_out)[kMaxClusterSize][kHeadDim + 2],
    uint64_t* arrived) {
  constexpr int kThreads = kWarps * kWarpSize;
  float highest = -INFINITY;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, warp_maximum[w]);
  const float shift = highest == -INFINITY ? 0.0f : highest;
  float weights[kWarps];
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    weights[w] = exp2_fast(warp_maximum[w] - shift);
    total += weights[w] * warp_total[w];
  }
  T* target = p.out + split.row * int64_t(p.num_heads) * p.head_dim + split.head * p.head_dim;
  const uint32_t barrier = address_in_rank(shared_address(arrived), 0);
#pragma unroll 1
  for (int column = threadIdx.x; column < p.head_dim; column += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += weights[w] * warp_out[w][column];
    if (split.used == 1) {
      // A row of which nothing is seen yields zeros.
      target[column] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
    } else {
      push(address_in_rank(shared_address(&split_out[split.index][column]), 0), sum, barrier);
    }
  }
  if (split.used == 1) return;
  if (threadIdx.x < 2) {
    push(address_in_rank(shared_address(&split_out[split.index][kHeadDim + threadIdx.x]), 0),
         threadIdx.x == 0 ? highest : total, barrier);
  }
  if (split.index != 0) return;
  barrier_wait(shared_address(arrived), 0);
  float split_weights[kMaxClusterSize];
  highest = -INFINITY;
#pragma unroll
  for (int s = 0; s < kMaxClusterSize; ++s) {
    split_weights[s] = s < split.used ? split_out[s][kHeadDim] : -INFINITY;
    highest = fmaxf(highest, split_weights[s]);
  }
  float all = 0.0f;
#pragma unroll
  for (int s = 0; s < kMaxClusterSize; ++s) {
    if (s < split.used) {
      split_weights[s] = exp2_fast(split_weights[s] - highest);
      all += split_weights[s] * split_out[s][kHeadDim + 1];
    }
  }
  const float inverse = 1.0f / all;
#pragma unroll 1
  for (int column = threadIdx.x; column < p.head_dim; column += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kMaxClusterSize; ++s)
      if (s < split.used) sum += split_weights[s] * split_out[s][column];
    target[column] = from_float<T>(sum * inverse);
  }
}

// kVector elements from an address that may not be aligned, and may end early. Out of line: it
// would stand in many places, and the instructions of a step are fetched again and again.
template <typename T>
__device__ __noinline__ uint4 load_elements(const T* source, int count) {
  Vector<T, kVectorSize<T>> elements;
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i)
    elements.data[i] = i < count ? source[i] : from_float<T>(0.0f);
  return reinterpret_cast<const uint4&>(elements);
}

template <typename T>
__device__ __forceinline__ uint4 load_piece(const T* source, int count, bool vectors) {
  if (count <= 0) return make_uint4(0, 0, 0, 0);
  return vectors ? load_cache(source) : load_elements(source, count);
}

// kLanes lanes own a key at a time, kPieces 16-byte pieces of it each; kHeadWarps warps own a head.
template <typename T, int kLanes, int kPieces, int kHeadWarps = kStepWarps>
struct StepAttentionTile {
  static constexpr int kGroups = kHeadWarps * kWarpSize / kLanes;
  static constexpr int kUnroll = kPieces == 1   ? 4
                                 : kPieces <= 3 ? 2
                                                : 1;  // keys of a group at once
  static constexpr int kStageKeys = kGroups * kUnroll;
  static constexpr int kStages = 2;
  static constexpr int kStageBytes = kUnroll * kPieces * 2 * kStepThreads * kVectorBytes;
};

// Every group of lanes has a running softmax of its own; groups meet by shuffles, warps and splits
// in shared memory. Any head_dim up to kLanes * kPieces * 16 bytes. Dynamic shared memory: kStages
// stages of keys and values, where a thread finds again what it asked for itself, so that it waits
// for no other. Reads K and V once. The launch before must release its dependents late: lengths and
// caches are read ahead of it. kHeadWarps = 1: every warp has a head of its own, blockIdx.y counts
// them by the block, and nothing is split: for rows so many that blocks would queue.
template <typename T, int kLanes, int kPieces, int kHeadWarps>
__global__ void __launch_bounds__(kStepThreads, 4)
    step_attention_kernel(const StepAttentionParams<T> p) {
  static_assert(kHeadWarps == 1 || kHeadWarps == kStepWarps);
  using Tile = StepAttentionTile<T, kLanes, kPieces, kHeadWarps>;
  constexpr int kVector = kVectorSize<T>;
  constexpr int kUnroll = Tile::kUnroll;
  constexpr int kHeadDim = kLanes * kPieces * kVector;
  extern __shared__ __align__(128) uint4 units[];
  constexpr int kMerged = kHeadWarps == 1 ? 1 : kHeadDim;  // nothing is merged in shared memory
  __shared__ float warp_out[kStepWarps][kMerged], warp_maximum[kStepWarps], warp_total[kStepWarps];
  __shared__ float split_out[kMaxClusterSize][kMerged + 2];  // and maximum and sum of a split
  __shared__ __align__(8) uint64_t arrived;

  const int warp = threadIdx.x / kWarpSize;
  const int head = kHeadWarps == 1 ? blockIdx.y * kStepWarps + warp : blockIdx.y;
  if (kHeadWarps == 1 && head >= p.num_heads) return;  // a whole warp leaves
  const StepSplit<T> split(p, head, kHeadWarps == 1 ? 0 : blockIdx.x,
                           kHeadWarps == 1 ? 1 : gridDim.x);
  if (split.index == 0) split.expect(&arrived, p.head_dim);
  const int begin = split.begin, end = split.end, length = split.length;
  const int group = threadIdx.x % (kHeadWarps * kWarpSize) / kLanes, lane = threadIdx.x % kLanes;

  auto slot = [&](int stage, int u, int piece, int which) -> uint4* {
    return units + (((stage * kUnroll + u) * kPieces + piece) * 2 + which) * kStepThreads +
           threadIdx.x;
  };
  auto load = [&](int stage, int first) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int key = first + u * Tile::kGroups + group;
      const bool valid = key < end;
      const int64_t at = valid ? split.at(p, key) : 0;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int column = (piece * kLanes + lane) * kVector;
        const int count = valid ? p.head_dim - column : 0;
        const int64_t source = count > 0 ? at + column : 0;
        if (p.vectors) {
          copy_async_16(slot(stage, u, piece, 0), p.key_cache + source, count > 0);
          copy_async_16(slot(stage, u, piece, 1), p.value_cache + source, count > 0);
        } else {
          *slot(stage, u, piece, 0) = load_piece(p.key_cache + source, count, false);
          *slot(stage, u, piece, 1) = load_piece(p.value_cache + source, count, false);
        }
      }
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages; ++stage) load(stage, begin + stage * Tile::kStageKeys);
  if (split.count > 1) {
    cluster_arrive();
    cluster_wait();
  }
  release_dependents();
  if (split.index >= split.used) return;
  wait_for_predecessor();

  const T* query = p.qkv + split.row * p.query_stride + split.head * p.head_dim;
  const bool has_new = !p.past_only && split.index == split.used - 1;
  float q[kPieces][kVector], out[kPieces][kVector] = {};
  float maximum = -INFINITY, total = 0.0f;
  {
    uint4 loaded[kPieces][3];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int column = (piece * kLanes + lane) * kVector, count = p.head_dim - column;
      loaded[piece][0] = load_piece(query + column, count, p.vectors);
      if (!has_new) continue;
      loaded[piece][1] = load_piece(query + p.key_offset + column, count, p.vectors);
      loaded[piece][2] = load_piece(query + p.value_offset + column, count, p.vectors);
    }
    float score = 0.0f;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      float key[kVector];
      unpack_vector<T>(loaded[piece][0], q[piece]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) q[piece][i] *= p.scale;
      if (!has_new) continue;
      unpack_vector<T>(loaded[piece][1], key);
#pragma unroll
      for (int i = 0; i < kVector; ++i) score = fmaf(q[piece][i], key[i], score);
    }
    if (has_new) {  // the same for the whole block
      score = warp_sum<kLanes>(score);
      if (group == 0) {
        maximum = score;
        total = 1.0f;
        const int64_t target = split.own_row + length * p.strides.token;
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          const int column = (piece * kLanes + lane) * kVector, count = p.head_dim - column;
          unpack_vector<T>(loaded[piece][2], out[piece]);
          if (p.vectors && count > 0) {
            *reinterpret_cast<uint4*>(p.key_cache + target + column) = loaded[piece][1];
            *reinterpret_cast<uint4*>(p.value_cache + target + column) = loaded[piece][2];
          } else {
#pragma unroll 1
            for (int i = 0; i < min(count, kVector); ++i) {
              p.key_cache[target + column + i] = query[p.key_offset + column + i];
              p.value_cache[target + column + i] = query[p.value_offset + column + i];
            }
          }
        }
      }
    }
  }

  int stage = 0;
  for (int first = begin; first < end; first += Tile::kStageKeys) {
    copy_async_wait<Tile::kStages - 1>();
    float scores[kUnroll];
    float highest = maximum;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float score = 0.0f;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        float key[kVector];
        unpack_vector<T>(*slot(stage, u, piece, 0), key);
#pragma unroll
        for (int i = 0; i < kVector; ++i) score = fmaf(q[piece][i], key[i], score);
      }
      score = warp_sum<kLanes>(score);
      scores[u] = first + u * Tile::kGroups + group < end ? score : -INFINITY;
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
        unpack_vector<T>(*slot(stage, u, piece, 1), value);
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          out[piece][i] = fmaf(probability, value[i], out[piece][i]);
      }
    }
    load(stage, first + Tile::kStages * Tile::kStageKeys);
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
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
  if constexpr (kHeadWarps == 1) {
    if (group != 0) return;
    // A row of which nothing is seen yields zeros.
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    T* target = p.out + (split.row * int64_t(p.num_heads) + head) * p.head_dim;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int column = (piece * kLanes + lane) * kVector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) out[piece][i] *= inverse;
      if (p.vectors && column < p.head_dim) {
        store_vector(target + column, out[piece]);
      } else {
        for (int i = 0; i < min(p.head_dim - column, kVector); ++i)
          target[column + i] = from_float<T>(out[piece][i]);
      }
    }
    return;
  }
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

  if constexpr (kHeadWarps > 1)
    finish_step_attention(p, split, warp_out, warp_maximum, warp_total, split_out, &arrived);
}

}  // namespace eet_patch::cuda
