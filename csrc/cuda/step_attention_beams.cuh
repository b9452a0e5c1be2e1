// step_attention.cuh for the beams of a sentence, which share most of their past: every key that
// any of them sees is read once, and the tensor cores multiply it with the queries of all. For fp16
// and bf16 rows that can be read 16 bytes at a time, and for more heads than blocks of one each
// would fit the chip.
#pragma once

#include "cuda/step_attention.cuh"

namespace eet_patch::cuda {

constexpr int kBeamRows = 8;  // of a warp: half of the m = 16 of a product

// kSteps: head_dim / 16, rounded up to one of the sizes that the launcher knows.
template <int kSteps>
struct StepBeamsTile {
  static constexpr int kHeadDim = kSteps * 16;
  static constexpr int kUnits = kHeadDim / 8;        // of 16 bytes, a row
  static constexpr int kStride = kHeadDim * 2 + 16;  // bytes; keeps fragments off shared banks
  static constexpr int kTileKeys = 16;
  static constexpr int kTileBytes = kTileKeys * kStride;  // of keys or of values
  static constexpr int kStages = 2;
  static constexpr int kWarpBytes = kStages * 2 * kTileBytes;
  static constexpr int kRingBytes = kStepWarps * kWarpBytes;
};

struct BeamKey {  // one key, and who sees it
  int cache_row;
  int position_and_rows;  // position << kBeamRows | a bit a row
};

// A warp owns a head (blockIdx.y counts four of them) and up to kBeamRows (x) of the p.shared_rows
// rows of a sentence (z), which have one length and one start. It goes through 32 positions at a
// time: lists the distinct keys that its rows have there, then takes sixteen of them at a time,
// with a running softmax a row. Dynamic shared memory: the tiles under way. Reads K and V of a
// distinct key once. Any head_dim up to kSteps * 16 that 8 divides.
template <typename T, int kSteps>
__global__ void __launch_bounds__(kStepThreads, 4)
    step_attention_beams_kernel(const StepAttentionParams<T> p) {
  using Tile = StepBeamsTile<kSteps>;
  extern __shared__ __align__(128) unsigned char ring[];
  __shared__ BeamKey lists[kStepWarps][kWarpSize * kBeamRows];
  release_dependents();
  wait_for_predecessor();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, q = lane % 4, matrix = lane / 8, line = lane % 8;
  const int head = blockIdx.y * kStepWarps + warp;
  if (head >= p.num_heads) return;  // a whole warp leaves
  const int first_row = blockIdx.z * p.shared_rows + blockIdx.x * kBeamRows;
  const int rows = min(kBeamRows, p.shared_rows - static_cast<int>(blockIdx.x) * kBeamRows);
  const int length = p.lengths[first_row];
  const int start = p.kv_start != nullptr ? max(0, min(p.kv_start[first_row], length)) : 0;
  const int64_t head_offset = head * p.strides.head;
  BeamKey* const list = lists[warp];
  const uint32_t own_ring = shared_address(ring) + warp * Tile::kWarpBytes;

  auto cache_row_of = [&](int row) {
    return p.cache_rows != nullptr ? p.cache_rows[first_row + row] : first_row + row;
  };
  // Lists the keys of 32 positions, and says how many there are.
  auto find_keys = [&](int first) {
    const int position = first + lane;
    int from[kBeamRows], distinct = 0;
    uint32_t seen_by[kBeamRows];
#pragma unroll
    for (int row = 0; row < kBeamRows; ++row) {
      seen_by[row] = 0;
      if (row >= rows || position >= length) continue;
      from[row] = p.key_rows != nullptr ? p.key_rows[(first_row + row) * p.capacity + position]
                                        : cache_row_of(row);
      bool is_new = true;
#pragma unroll
      for (int other = 0; other < row; ++other) {
        if (is_new && from[other] == from[row]) {
          seen_by[other] |= seen_by[other] != 0 ? 1u << row : 0;
          is_new = seen_by[other] == 0;
        }
      }
      if (is_new) seen_by[row] = 1u << row, ++distinct;
    }
    int before = distinct;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int other = __shfl_up_sync(kFullMask, before, offset);
      if (lane >= offset) before += other;
    }
    const int all = __shfl_sync(kFullMask, before, kWarpSize - 1);
    before -= distinct;
    __syncwarp();  // the list before is read
#pragma unroll
    for (int row = 0; row < kBeamRows; ++row) {
      if (seen_by[row] != 0)
        list[before++] = {from[row], position << kBeamRows | static_cast<int>(seen_by[row])};
    }
    __syncwarp();
    return all;
  };
  const int units = p.head_dim / 8;
  auto load = [&](int stage, int first, int count) {
    const uint32_t keys = own_ring + stage * 2 * Tile::kTileBytes;
#pragma unroll
    for (int i = 0; i < Tile::kUnits * Tile::kTileKeys / kWarpSize; ++i) {
      const int e = i * kWarpSize + lane, key = first + e / Tile::kUnits, unit = e % Tile::kUnits;
      const bool valid = key < count && unit < units;
      int64_t at = 0;
      if (valid) {
        const BeamKey entry = list[key];
        at = entry.cache_row * p.strides.batch + head_offset +
             (entry.position_and_rows >> kBeamRows) * p.strides.token + unit * 8;
      }
      const uint32_t target = keys + e / Tile::kUnits * Tile::kStride + unit * kVectorBytes;
      copy_async_16(target, p.key_cache + at, valid);
      copy_async_16(target + Tile::kTileBytes, p.value_cache + at, valid);
    }
    copy_async_commit();
  };

  // Row g of the first operand is the query of row g; rows 8 to 15 are zeros.
  const T* query = p.qkv + (first_row + min(g, rows - 1)) * p.query_stride + head * p.head_dim;
  uint32_t query_low[kSteps], query_high[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = step * 16 + 2 * q;
    query_low[step] = g < rows && column < p.head_dim
                          ? __ldcg(reinterpret_cast<const uint32_t*>(query + column))
                          : 0;
    query_high[step] = g < rows && column + 8 < p.head_dim
                           ? __ldcg(reinterpret_cast<const uint32_t*>(query + column + 8))
                           : 0;
  }
  float out[2 * kSteps][4] = {};  // columns 8 i + 2 q and the one behind of row g
  float maximum = -INFINITY, total = 0.0f;
  auto rescale = [&](float highest) {
    const float correction = exp2_fast(maximum - (highest == -INFINITY ? 0.0f : highest));
    maximum = highest;
    total *= correction;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      out[i][0] *= correction;
      out[i][1] *= correction;
    }
  };
  for (int round = start; round < length; round += kWarpSize) {
    const int count = find_keys(round);
    load(0, 0, count);
    int stage = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += Tile::kTileKeys) {
      const bool more = first + Tile::kTileKeys < count;
      if (more) load(stage ^ 1, first + Tile::kTileKeys, count);
      if (more) {
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      __syncwarp();
      const uint32_t keys = own_ring + stage * 2 * Tile::kTileBytes;
      const uint32_t values = keys + Tile::kTileBytes;
      float scores[2][4] = {};  // of keys 8 i + 2 q and the one behind
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[4];
        ldmatrix_x4(b, keys + (matrix / 2 * 8 + line) * Tile::kStride +
                           (step * 2 + matrix % 2) * kVectorBytes);
        mma_m16n8k16<T>(scores[0], query_low[step], 0, query_high[step], 0, b[0], b[1]);
        mma_m16n8k16<T>(scores[1], query_low[step], 0, query_high[step], 0, b[2], b[3]);
      }
      float highest = maximum;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = first + 8 * i + 2 * q + j;
          const bool sees = key < count && (list[key].position_and_rows >> g & 1) != 0;
          scores[i][j] = sees ? scores[i][j] * p.scale : -INFINITY;
          highest = fmaxf(highest, scores[i][j]);
        }
      }
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 2));
      rescale(highest);
      const float shift = highest == -INFINITY ? 0.0f : highest;
      uint32_t weights[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float low = exp2_fast(scores[i][0] - shift), high = exp2_fast(scores[i][1] - shift);
        total += low + high;
        weights[i] = pack2<T>(low, high);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, values + (matrix % 2 * 8 + line) * Tile::kStride +
                                 (step * 2 + matrix / 2) * kVectorBytes);
        mma_m16n8k16<T>(out[2 * step], weights[0], 0, weights[1], 0, b[0], b[1]);
        mma_m16n8k16<T>(out[2 * step + 1], weights[0], 0, weights[1], 0, b[2], b[3]);
      }
      __syncwarp();  // the tile may be overwritten
      stage ^= 1;
    }
  }

  if (!p.past_only) {  // its own key and value, which came with the query
    float score = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = step * 16 + half * 8 + 2 * q;
        if (column >= p.head_dim) continue;
        const float2 a = unpack2<T>(half == 0 ? query_low[step] : query_high[step]);
        const float2 b =
            unpack2<T>(__ldcg(reinterpret_cast<const uint32_t*>(query + p.key_offset + column)));
        score = fmaf(a.x, b.x, fmaf(a.y, b.y, score));
      }
    }
    score = warp_sum<4>(score) * p.scale;
    if (!(score <= maximum)) rescale(score);
    const float probability = exp2_fast(score - maximum);
    if (q == 0) total += probability;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int column = 8 * i + 2 * q;
      if (column >= p.head_dim) continue;
      const float2 value =
          unpack2<T>(__ldcg(reinterpret_cast<const uint32_t*>(query + p.value_offset + column)));
      out[i][0] = fmaf(probability, value.x, out[i][0]);
      out[i][1] = fmaf(probability, value.y, out[i][1]);
    }
    if (g < rows) {
      const int64_t target =
          cache_row_of(g) * p.strides.batch + head_offset + length * p.strides.token;
      for (int unit = q; unit < units; unit += 4) {
        *reinterpret_cast<uint4*>(p.key_cache + target + unit * 8) =
            load_input(query + p.key_offset + unit * 8);
        *reinterpret_cast<uint4*>(p.value_cache + target + unit * 8) =
            load_input(query + p.value_offset + unit * 8);
      }
    }
  }
  total = warp_sum<4>(total);
  if (g >= rows) return;
  // A row of which nothing is seen yields zeros.
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  T* target = p.out + ((first_row + g) * int64_t(p.num_heads) + head) * p.head_dim;
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) {
    const int column = 8 * i + 2 * q;
    if (column < p.head_dim) {
      *reinterpret_cast<uint32_t*>(target + column) =
          pack2<T>(out[i][0] * inverse, out[i][1] * inverse);
    }
  }
}

}  // namespace eet_patch::cuda
