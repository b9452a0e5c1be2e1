// step_attention.cuh on tensor cores, for fp16 and bf16 rows that can be read 16 bytes at a time:
// 16 keys at a time are the m of mma.m16n8k16, the query (then the probabilities) one column of its
// n = 8 or all of them. Tensor cores idle either way; what counts is that a third of the
// instructions does.
#pragma once

#include "cuda/step_attention.cuh"

namespace eet_patch::cuda {

constexpr int kStepTileKeys = 16;  // of a warp at a time

// kSteps: head_dim / 16, rounded up to one of the sizes that the launcher knows.
template <int kSteps>
struct StepMmaTile {
  static constexpr int kHeadDim = kSteps * 16;
  static constexpr int kUnits = kHeadDim / 8;        // of 16 bytes, a row
  static constexpr int kStride = kHeadDim * 2 + 16;  // bytes; keeps fragments off shared banks
  static constexpr int kTileBytes = kStepTileKeys * kStride;  // of keys or of values
  // Tiles of each that a warp has on their way. One is asked for before the wait, and leaves room
  // for the products before and after, so that all fit a multiprocessor at once; wider heads, which
  // take longer, gain more from a second (on an H100, batch 4 and 800 keys: 14.6 us for 18.4 at a
  // head_dim of 80, where the next product loses 2; nothing at 64).
  static constexpr int kStages = kSteps > 4 ? 2 : 1;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kRingBytes = kStepWarps * kStages * kStageBytes;
};

// blockIdx, splits and the hand-over between them: as step_attention_kernel. A warp takes every
// kStepWarps-th tile of its block's keys, which it copies to shared memory for itself,
// and has a running softmax of its own. Dynamic shared memory: the tiles under way. Reads K
// and V once. The launch before must release its dependents late.
template <typename T, int kSteps>
__global__ void __launch_bounds__(kStepThreads, 4)
    step_attention_mma_kernel(const StepAttentionParams<T> p) {
  using Tile = StepMmaTile<kSteps>;
  extern __shared__ __align__(128) unsigned char ring[];
  __shared__ float warp_out[kStepWarps][Tile::kHeadDim], warp_maximum[kStepWarps],
      warp_total[kStepWarps];
  __shared__ float split_out[kMaxClusterSize][Tile::kHeadDim + 2];
  __shared__ __align__(8) uint64_t arrived;

  const StepSplit<T> split(p);
  if (split.index == 0) split.expect(&arrived, p.head_dim);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, q = lane % 4, matrix = lane / 8, line = lane % 8;
  constexpr int kStages = Tile::kStages;
  const uint32_t own_ring = shared_address(ring) + warp * kStages * Tile::kStageBytes;
  constexpr int kRoundKeys = kStepWarps * kStepTileKeys;

  const int units = p.head_dim / 8;
  auto load = [&](int first, uint32_t stage) {
#pragma unroll
    for (int i = 0; i < Tile::kUnits * kStepTileKeys / kWarpSize; ++i) {
      const int e = i * kWarpSize + lane, key = first + e / Tile::kUnits, unit = e % Tile::kUnits;
      const bool valid = key < split.end && unit < units;
      const int64_t at = valid ? split.at(p, key) + unit * 8 : 0;
      const uint32_t target = stage + e / Tile::kUnits * Tile::kStride + unit * kVectorBytes;
      copy_async_16(target, p.key_cache + at, valid);
      copy_async_16(target + Tile::kTileBytes, p.value_cache + at, valid);
    }
  };
  int first = split.begin + warp * kStepTileKeys;
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) {
    load(first + s * kRoundKeys, own_ring + s * Tile::kStageBytes);
    copy_async_commit();
  }
  if (split.count > 1) {
    cluster_arrive();
    cluster_wait();
  }
  release_dependents();
  if (split.index >= split.used) return;
  const T* query = p.qkv + split.row * p.query_stride + split.head * p.head_dim;
  const bool has_new = !p.past_only && split.index == split.used - 1;
  wait_for_predecessor();

  // Column 0 of the second operand is the query, the others are zeros.
  uint32_t query_low[kSteps], query_high[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = step * 16 + 2 * q;
    query_low[step] = g == 0 && column < p.head_dim
                          ? __ldcg(reinterpret_cast<const uint32_t*>(query + column))
                          : 0;
    query_high[step] = g == 0 && column + 8 < p.head_dim
                           ? __ldcg(reinterpret_cast<const uint32_t*>(query + column + 8))
                           : 0;
  }
  if (has_new && warp == kStepWarps - 1) {
    const int64_t target = split.own_row + split.length * p.strides.token;
#pragma unroll 1
    for (int unit = lane; unit < 2 * units; unit += kWarpSize) {
      const int column = unit % units * 8;
      T* cache = unit < units ? p.key_cache : p.value_cache;
      *reinterpret_cast<uint4*>(cache + target + column) = __ldcg(reinterpret_cast<const uint4*>(
          query + (unit < units ? p.key_offset : p.value_offset) + column));
    }
  }

  float out[kSteps][4] = {};  // elements 0 and 2 are used: columns g and g + 8 of a step
  float maximum = -INFINITY, total = 0.0f;
  auto rescale = [&](float highest) {
    const float correction = exp2_fast(maximum - highest);
    maximum = highest;
    total *= correction;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      out[step][0] *= correction;
      out[step][2] *= correction;
    }
  };
  uint32_t keys = own_ring;
#pragma unroll 1
  for (; first < split.end; first += kRoundKeys) {
    copy_async_wait<kStages - 1>();
    __syncwarp();
    const uint32_t values = keys + Tile::kTileBytes;
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      ldmatrix_x4(a, keys + (matrix % 2 * 8 + line) * Tile::kStride +
                         (step * 2 + matrix / 2) * kVectorBytes);
      mma_m16n8k16<T>(scores[step % 2], a[0], a[1], a[2], a[3], query_low[step], query_high[step]);
    }
    // Keys g and g + 8 of the tile, in all lanes of the four.
    float low = __shfl_sync(kFullMask, scores[0][0] + scores[1][0], lane & ~3) * p.scale;
    float high = __shfl_sync(kFullMask, scores[0][2] + scores[1][2], lane & ~3) * p.scale;
    if (first + g >= split.end) low = -INFINITY;
    if (first + g + 8 >= split.end) high = -INFINITY;
    float highest = fmaxf(low, high);
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2)
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, offset));
    if (!(highest <= maximum)) rescale(highest);  // no number shows in the result
    const float shift = maximum == -INFINITY ? 0.0f : maximum;
    low = exp2_fast(low - shift);
    high = exp2_fast(high - shift);
    total += low + high;
    const uint32_t first_pair =
        pack2<T>(__shfl_sync(kFullMask, low, 8 * q), __shfl_sync(kFullMask, low, 8 * q + 4));
    const uint32_t second_pair =
        pack2<T>(__shfl_sync(kFullMask, high, 8 * q), __shfl_sync(kFullMask, high, 8 * q + 4));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      ldmatrix_x4_trans(a, values + (matrix / 2 * 8 + line) * Tile::kStride +
                               (step * 2 + matrix % 2) * kVectorBytes);
      mma_m16n8k16<T>(out[step], a[0], a[1], a[2], a[3], first_pair, second_pair);
    }
    __syncwarp();
    if (first + kStages * kRoundKeys < split.end) load(first + kStages * kRoundKeys, keys);
    copy_async_commit();
    keys += Tile::kStageBytes;
    if (keys == own_ring + kStages * Tile::kStageBytes) keys = own_ring;
  }
#pragma unroll
  for (int offset = 4; offset < kWarpSize; offset *= 2)
    total += __shfl_xor_sync(kFullMask, total, offset);

  if (has_new && warp == kStepWarps - 1) {  // its own key and value, which came with the query
    float score = 0.0f;
#pragma unroll 1
    for (int column = 2 * lane; column < p.head_dim; column += 2 * kWarpSize) {
      const float2 a = unpack2<T>(__ldcg(reinterpret_cast<const uint32_t*>(query + column)));
      const float2 b =
          unpack2<T>(__ldcg(reinterpret_cast<const uint32_t*>(query + p.key_offset + column)));
      score = fmaf(a.x, b.x, fmaf(a.y, b.y, score));
    }
    score = warp_sum(score) * p.scale;
    if (!(score <= maximum)) rescale(score);
    const float probability = exp2_fast(score - maximum);
    total += probability;
    const T* value = query + p.value_offset;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = step * 16 + g;
      if (column < p.head_dim)
        out[step][0] = fmaf(probability, to_float(load_fresh(value + column)), out[step][0]);
      if (column + 8 < p.head_dim)
        out[step][2] = fmaf(probability, to_float(load_fresh(value + column + 8)), out[step][2]);
    }
  }
  if (q == 0) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      warp_out[warp][step * 16 + g] = out[step][0];
      warp_out[warp][step * 16 + g + 8] = out[step][2];
    }
    if (lane == 0) warp_maximum[warp] = maximum, warp_total[warp] = total;
  }
  __syncthreads();
  finish_step_attention(p, split, warp_out, warp_maximum, warp_total, split_out, &arrived);
}

}  // namespace eet_patch::cuda
