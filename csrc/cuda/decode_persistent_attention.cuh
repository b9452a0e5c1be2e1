// The attention of the persistent decode kernel: keys split over warps and blocks
// (Flash-Decoding, Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html),
// partial results met in a fixed order.
#pragma once

#include "common/attention_mask.cuh"
#include "cuda/decode_persistent_stream.cuh"

namespace eet_patch::cuda {

// Partial results of a block's warps that may share their head with a neighbour: the first and the
// last head of each warp, in order.
struct HeadEntries {
  static constexpr int kCount = 2 * kStepWarps;
  int* pair;      // row * heads + head, or -1
  float* values;  // kCount of (head_dim + kPartialExtra)
};

// A warp owns its units, streamed tile by tile: scores are a product of 16 keys with the query as
// every one of n = 8 columns, so each lane holds the scores of keys lane / 4 and lane / 4 + 8; the
// weighted values likewise, 16 columns of the head at a time. kSlices bounds head_dim / 16.
template <typename T, int kSlices>
__device__ __forceinline__ void attend(const StepParams<T>& p, SlotRing& ring, const StepRow* rows,
                                       const UnitCursor& first_unit, const DecodeLayer& layer,
                                       const HeadEntries& entries) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, q = lane % 4, matrix = lane / 8;
  const int head_dim = p.head_dim, slices = head_dim / 16, pieces = head_dim / 8;
  const float scale = static_cast<float>(layer.softmax_scale) * kLog2E;
  const Swizzle swizzle(pieces);
  const int key_row = (matrix & 1) * 8 + lane % 8, key_swizzle = swizzle(key_row),
            value_row = (matrix >> 1) * 8 + lane % 8, value_swizzle = swizzle(value_row);
  const bool both = head_dim <= kSharedTileHeadDim;
  const int stride = head_dim + kPartialExtra;

  int row = first_unit.row, head = first_unit.head, tile = first_unit.tile, left = first_unit.left;
  int* pair_of = entries.pair + 2 * warp;
  if (lane < 2) pair_of[lane] = -1;
  __syncwarp();
  bool first_pair = true;
  while (left > 0) {
    const StepRow info = rows[row];
    const int begin = tile, end = min(tile + left, info.tiles + 1);
    const bool has_new = end > info.tiles;
    const T* source = p.qkv + int64_t(row) * 3 * p.hidden_size + head * head_dim;
    auto load_pairs = [&](uint32_t(&pairs)[kSlices][2], const T* from) {
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        if (j >= slices) break;
        pairs[j][0] = __ldcg(reinterpret_cast<const uint32_t*>(from + 16 * j + 2 * q));
        pairs[j][1] = __ldcg(reinterpret_cast<const uint32_t*>(from + 16 * j + 2 * q + 8));
      }
    };
    uint32_t query[kSlices][2], new_key[kSlices][2];
    unsigned short new_value[kSlices][2];
    load_pairs(query, source);
    if (has_new) {
      load_pairs(new_key, source + p.hidden_size);
      const unsigned short* from =
          reinterpret_cast<const unsigned short*>(source + 2 * p.hidden_size);
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        if (j >= slices) break;
        new_value[j][0] = __ldcg(from + 16 * j + g);
        new_value[j][1] = __ldcg(from + 16 * j + 8 + g);
      }
    }

    float maximum = -INFINITY, total = 0.0f, out[kSlices][4] = {};
    for (; tile < min(end, info.tiles); ++tile) {
      ring.wait_full();
      const unsigned char* keys = ring.data();
      float scores[2][4] = {};
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        if (j >= slices) break;
        uint32_t a[4];
        ldmatrix_x4(a, keys + (key_row * pieces + ((2 * j + (matrix >> 1)) ^ key_swizzle)) *
                                  kVectorBytes);
        mma_m16n8k16<T>(scores[j % 2], a[0], a[1], a[2], a[3], query[j][0], query[j][1]);
      }
      const unsigned char* values = keys + kSlotBytes / 2;
      if (!both) {
        ring.release();
        ring.wait_full();
        values = ring.data();
      }
      const int key = info.first_key + tile * kTileKeys + g;
      const bool low_seen = key >= info.start && key < info.length,
                 high_seen = key + 8 >= info.start && key + 8 < info.length;
      const float low = low_seen ? (scores[0][0] + scores[1][0]) * scale : -INFINITY,
                  high = high_seen ? (scores[0][2] + scores[1][2]) * scale : -INFINITY;
      float highest = fmaxf(low, high);
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2)
        highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, offset));
      highest = fmaxf(highest, maximum);
      const float shift = highest == -INFINITY ? 0.0f : highest;
      const float correction = exp2_fast(maximum - shift);
      maximum = highest;
      const float p_low = exp2_fast(low - shift), p_high = exp2_fast(high - shift);
      total = fmaf(total, correction, p_low + p_high);
      const uint32_t b0 = pack2<T>(__shfl_sync(kFullMask, p_low, 8 * q),
                                   __shfl_sync(kFullMask, p_low, 8 * q + 4));
      const uint32_t b1 = pack2<T>(__shfl_sync(kFullMask, p_high, 8 * q),
                                   __shfl_sync(kFullMask, p_high, 8 * q + 4));
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        if (j >= slices) break;
        uint32_t a[4];
        ldmatrix_x4_trans(a, values + (value_row * pieces +
                                       ((2 * j + (matrix & 1)) ^ value_swizzle)) *
                                          kVectorBytes);
        out[j][0] *= correction;  // 1 and 3 repeat these, and are not looked at
        out[j][2] *= correction;
        mma_m16n8k16<T>(out[j], a[0], a[1], a[2], a[3], b0, b1);
      }
      ring.release();
    }

    if (has_new) {
      float score = 0.0f;
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        if (j >= slices) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 a = unpack2<T>(query[j][i]), b = unpack2<T>(new_key[j][i]);
          score = fmaf(a.x, b.x, fmaf(a.y, b.y, score));
        }
      }
      score = warp_sum<4>(score) * scale;
      if (info.start > info.length) score = -INFINITY;
      const float highest = fmaxf(maximum, score);
      const float shift = highest == -INFINITY ? 0.0f : highest;
      const float correction = exp2_fast(maximum - shift), probability = exp2_fast(score - shift);
      maximum = highest;
      // Each group of four lanes holds its own keys' part of the sum; one of them takes this one.
      total = fmaf(total, correction, g == 0 ? probability : 0.0f);
      const int64_t offset = info.cache_offset + head * p.cache_strides.head +
                             info.length * p.cache_strides.token;
      uint32_t* key_out = reinterpret_cast<uint32_t*>(static_cast<T*>(layer.key_cache) + offset);
      unsigned short* value_out =
          reinterpret_cast<unsigned short*>(static_cast<T*>(layer.value_cache) + offset);
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        if (j >= slices) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned short bits = new_value[j][i];
          const float value = to_float(reinterpret_cast<const T&>(bits));
          // A hidden token's value may be anything.
          const float term = probability == 0.0f ? 0.0f : probability * value;
          out[j][2 * i] = fmaf(out[j][2 * i], correction, term);
          if (g == 0) key_out[8 * j + q + 4 * i] = new_key[j][i];
          if (q == 0) value_out[16 * j + 8 * i + g] = bits;
        }
      }
    }
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2)
      total += __shfl_xor_sync(kFullMask, total, offset);

    // The warp's first and last head may go on in its neighbours; one between is its own.
    left -= end - begin;
    const int pair = row * p.num_heads + head;
    float* target = p.partials + int64_t(pair + blockIdx.x) * stride;
    if (first_pair || left == 0) {
      const int entry = first_pair ? 0 : 1;
      target = entries.values + (2 * warp + entry) * stride;
      if (lane == 0) pair_of[entry] = pair;
    }
    first_pair = false;
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
      if (j >= slices) break;
      if (q == 0) {
        target[16 * j + g] = out[j][0];
        target[16 * j + 8 + g] = out[j][2];
      }
    }
    if (lane == 0) {
      target[head_dim] = maximum;
      target[head_dim + 1] = total;
    }
    tile = 0;
    if (++head == p.num_heads) head = 0, ++row;
  }
}

// Adds the entries of one head and leaves them as the block's partial result: the warp that holds
// the head's first entry does it. Every warp calls it, after a barrier.
template <typename T>
__device__ __forceinline__ void merge_entries(const StepParams<T>& p, const HeadEntries& entries) {
  constexpr int kColumnsPerLane = kMaxHeadDim / kWarpSize;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int stride = p.head_dim + kPartialExtra;
  const int lane_pair = lane < HeadEntries::kCount ? entries.pair[lane] : -1;
  const float* lane_values = entries.values + lane * stride + p.head_dim;
#pragma unroll 1
  for (int first = 2 * warp; first < 2 * warp + 2; ++first) {
    const int pair = __shfl_sync(kFullMask, lane_pair, first);
    const bool same = lane_pair == pair;
    unsigned members = __ballot_sync(kFullMask, same);
    if (pair < 0 || __ffs(members) - 1 != first) continue;
    const float highest = warp_max(same ? lane_values[0] : -INFINITY);
    const float shift = highest == -INFINITY ? 0.0f : highest;
    const float weight = same ? exp2_fast(lane_values[0] - shift) : 0.0f;
    const float total = warp_sum(same ? weight * lane_values[1] : 0.0f);
    float sums[kColumnsPerLane] = {};
#pragma unroll 1
    for (; members != 0; members &= members - 1) {
      const int entry = __ffs(members) - 1;
      const float factor = __shfl_sync(kFullMask, weight, entry);
      const float* values = entries.values + entry * stride + lane;
#pragma unroll
      for (int i = 0; i < kColumnsPerLane; ++i) {
        if (lane + i * kWarpSize < p.head_dim)
          sums[i] = fmaf(factor, values[i * kWarpSize], sums[i]);
      }
    }
    float* target = p.partials + int64_t(pair + blockIdx.x) * stride;
#pragma unroll
    for (int i = 0; i < kColumnsPerLane; ++i) {
      if (lane + i * kWarpSize < p.head_dim) target[lane + i * kWarpSize] = sums[i];
    }
    if (lane == 0)
      *reinterpret_cast<float2*>(target + p.head_dim) = make_float2(highest, total);
  }
}

// Columns [columns.begin, columns.end) of the attention's result in the panel, from the blocks'
// partial ones in their order; a thread 4 columns of a row at a time.
template <typename T>
__device__ __forceinline__ void combine_heads(const StepParams<T>& p, const StepRow* step_rows,
                                              const AttentionUnits& units, Range columns,
                                              T* panel) {
  constexpr int kColumns = 4, kAtOnce = 4;
  const int stride = p.head_dim + kPartialExtra, items = (columns.end - columns.begin) / kColumns;
#pragma unroll 1
  for (int item = threadIdx.x; item < p.rows * items; item += kStepThreads) {
    const int row = item / items, local = (item - row * items) * kColumns;
    const int column = columns.begin + local;
    const int head = column / p.head_dim, pair = row * p.num_heads + head;
    const int unit = step_rows[row].first_unit + head * (step_rows[row].tiles + 1);
    const int begin = units.block_of(unit), end = units.block_of(unit + step_rows[row].tiles);
    const float* values = p.partials + int64_t(pair) * stride;
    const int offset = column - head * p.head_dim;
    float maximum = -INFINITY, total = 0.0f, sums[kColumns] = {};
#pragma unroll 1
    for (int block = begin; block <= end; block += kAtOnce) {
      float4 parts[kAtOnce];
      float2 scales[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float* from = values + int64_t(min(block + i, end)) * stride;
        parts[i] = __ldcg(reinterpret_cast<const float4*>(from + offset));
        scales[i] = __ldcg(reinterpret_cast<const float2*>(from + p.head_dim));
        if (block + i > end) scales[i] = make_float2(-INFINITY, 0.0f);
      }
      float highest = maximum;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) highest = fmaxf(highest, scales[i].x);
      const float shift = highest == -INFINITY ? 0.0f : highest;
      const float before = exp2_fast(maximum - shift);
      maximum = highest;
      total *= before;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[i] *= before;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (block + i > end) break;
        const float now = exp2_fast(scales[i].x - shift);
        total = fmaf(now, scales[i].y, total);
        sums[0] = fmaf(now, parts[i].x, sums[0]);
        sums[1] = fmaf(now, parts[i].y, sums[1]);
        sums[2] = fmaf(now, parts[i].z, sums[2]);
        sums[3] = fmaf(now, parts[i].w, sums[3]);
      }
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    uint2 packed;
    packed.x = pack2<T>(sums[0] * inverse, sums[1] * inverse);
    packed.y = pack2<T>(sums[2] * inverse, sums[3] * inverse);
    *reinterpret_cast<uint2*>(panel + row * p.panel_stride + local) = packed;
  }
}

}  // namespace eet_patch::cuda
