// What a warpgroup of attention over packed sequences (packed_attention.cuh) does to its rows:
// scores, online softmax, sums of values, and the way out.
#pragma once

#include "common/attention_mask.cuh"
#include "common/bulk_copy.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "common/wgmma_registers.cuh"

namespace eet_patch::cuda {

constexpr int kWarpgroupQueries = 64;

// kWarpgroups times 64 queries of one head against tiles of kKeys keys, kStages of them in flight;
// kBlocks blocks a multiprocessor.
template <int kHeadDim_, int kWarpgroups_, int kKeys_, int kStages_, int kBlocks_>
struct PackedTile {
  static constexpr int kHeadDim = kHeadDim_, kWarpgroups = kWarpgroups_, kKeys = kKeys_,
                       kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kThreads = 128 * kWarpgroups, kQueries = kWarpgroupQueries * kWarpgroups;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kLineBytes = kRowBytes < kSwizzleBytes ? kRowBytes : kSwizzleBytes;
  static constexpr int kParts = kRowBytes / kLineBytes;  // a row's lines lie in a tile each
  static constexpr int kQueryBytes = kQueries * kRowBytes, kKeyBytes = kKeys * kRowBytes;
  // Behind the tiles: barriers for the queries, and for the keys, the values and the emptiness of
  // each stage; then where the sequence starts, and its length.
  static constexpr int kBarriers = 1 + 3 * kStages;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStages * kKeyBytes + 8 * kBarriers + 8;
  // The longest sequences served. With fewer than three stages none is filled a second time: the
  // scores of a tile are queued before the stage of the tile before is free.
  static constexpr int kMaxLength = kStages >= 3 ? 1 << 26 : kStages * kKeys;
  static_assert(kKeys % 16 == 0 && (kLineBytes == 64 || kLineBytes == 128));
};

__device__ __forceinline__ void store_four_matrices(uint32_t address, uint32_t r0, uint32_t r1,
                                                    uint32_t r2, uint32_t r3) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
#endif
}

// What a lane keeps of two rows, 16 w + g and the 8th behind it, of its warpgroup's 64 (w: warp, g:
// lane / 4), while tiles of keys go by.
template <typename T, typename Tile>
struct PackedRows {
  static constexpr int kColumns = Tile::kLineBytes / 2;  // of a part
  // The maximum that exponents are taken against may lag behind by this much, in units of log2: far
  // from overflow of fp16, and the sums need no new scale at most tiles.
  static constexpr float kSlack = 8.0f;

  float out[Tile::kParts][kColumns / 2];
  float scores[Tile::kKeys / 2];
  uint32_t probabilities[Tile::kKeys / 16][4];
  float maximum[2], total[2];  // maximum: scaled; total: over this lane's columns

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) out[part][i] = 0.0f;
    }
    maximum[0] = maximum[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
  }

  // Queues scores = queries @ keys^T.
  __device__ __forceinline__ void multiply_keys(uint32_t queries, uint32_t keys) {
    constexpr int kSteps = Tile::kLineBytes / 32;
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const uint64_t a =
          line_descriptor<Tile::kLineBytes>(queries + part * Tile::kQueries * Tile::kLineBytes);
      const uint64_t b =
          line_descriptor<Tile::kLineBytes>(keys + part * Tile::kKeys * Tile::kLineBytes);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        WarpgroupProduct<T, Tile::kKeys>::add(scores, a + step * kDescriptorStep,
                                              b + step * kDescriptorStep, part != 0 || step != 0);
      }
    }
    warpgroup_commit();
  }

  // Queues out += probabilities @ values.
  __device__ __forceinline__ void multiply_values(uint32_t values) {
    constexpr int kStep = 16 * Tile::kLineBytes >> 4;
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const uint64_t b =
          line_descriptor<Tile::kLineBytes>(values + part * Tile::kKeys * Tile::kLineBytes);
#pragma unroll
      for (int step = 0; step < Tile::kKeys / 16; ++step)
        WarpgroupRegisterProduct<T, kColumns>::add(out[part], probabilities[step],
                                                   b + step * kStep);
    }
    warpgroup_commit();
  }

  __device__ __forceinline__ void hold() {
    keep_in_place(scores);
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) keep_in_place(out[part]);
  }

  // Keys from `count` on are none of this sequence's.
  __device__ __forceinline__ void hide_from(int count) {
    const int column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < Tile::kKeys / 2; ++i) {
      if (i / 4 * 8 + column + i % 2 >= count) scores[i] = -INFINITY;
    }
  }

  // Scores to probabilities.
  __device__ __forceinline__ void exponentiate(float scale) {
    float highest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = fmaxf(scores[2 * half], scores[2 * half + 1]);
#pragma unroll
      for (int i = 4 + 2 * half; i < Tile::kKeys / 2; i += 4)
        highest[half] = fmaxf(highest[half], fmaxf(scores[i], scores[i + 1]));
      highest[half] = warp_max<4>(highest[half]) * scale;
    }
    const bool lags = highest[0] > maximum[0] + kSlack || highest[1] > maximum[1] + kSlack;
    if (__any_sync(kFullMask, lags)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float raised = fmaxf(maximum[half], highest[half]);
        // No finite score yet: nothing is summed up, and -inf - -inf would be NaN.
        const float correction = raised == -INFINITY ? 1.0f : exp2_fast(maximum[half] - raised);
        maximum[half] = raised;
        total[half] *= correction;
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
          for (int i = 2 * half; i < kColumns / 2; i += 4) {
            out[part][i] *= correction;
            out[part][i + 1] *= correction;
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shift = maximum[half] == -INFINITY ? 0.0f : maximum[half];
#pragma unroll
      for (int i = 2 * half; i < Tile::kKeys / 2; i += 4) {
        scores[i] = exp2_fast(fmaf(scores[i], scale, -shift));
        scores[i + 1] = exp2_fast(fmaf(scores[i + 1], scale, -shift));
        total[half] += scores[i] + scores[i + 1];
      }
    }
#pragma unroll
    for (int step = 0; step < Tile::kKeys / 16; ++step)
      pack_operand<T>(probabilities[step], scores + 8 * step);
  }

  // The warp's 16 rows over its part of `staging`, whose lines it alone uses; `rows` are stored.
  __device__ __forceinline__ void store(uint32_t staging, T* target, int64_t stride, int rows) {
    constexpr int kUnits = Tile::kLineBytes / kVectorBytes;  // a line
    constexpr int kPartBytes = Tile::kQueries * Tile::kLineBytes;
    const int lane = threadIdx.x % kWarpSize;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = warp_sum<4>(total[half]);
      inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
    // A line's 16-byte units are permuted so that no 8 addresses of an access meet in a bank.
    const auto unit_address = [&](int part, int row, int unit) {
      const int turn = kUnits == 8 ? row % 8 : row / 2 % 4;
      return staging + part * kPartBytes + row * Tile::kLineBytes + (unit ^ turn) * kVectorBytes;
    };
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
      for (int pair = 0; pair < kColumns / 16; ++pair) {
        const float* sums = out[part] + 8 * pair;
        store_four_matrices(unit_address(part, lane % 16, 2 * pair + lane / 16),
                            pack2<T>(sums[0] * inverse[0], sums[1] * inverse[0]),
                            pack2<T>(sums[2] * inverse[1], sums[3] * inverse[1]),
                            pack2<T>(sums[4] * inverse[0], sums[5] * inverse[0]),
                            pack2<T>(sums[6] * inverse[1], sums[7] * inverse[1]));
      }
    }
    __syncwarp();
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
#pragma unroll
      for (int step = 0; step < 16 * kUnits / kWarpSize; ++step) {
        const int index = step * kWarpSize + lane, row = index / kUnits, unit = index % kUnits;
        if (row < rows) {
          *reinterpret_cast<uint4*>(target + row * stride + part * kColumns +
                                    unit * kVectorSize<T>) =
              load_shared(unit_address(part, row, unit));
        }
      }
    }
  }
};

}  // namespace eet_patch::cuda
