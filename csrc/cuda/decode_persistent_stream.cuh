// What the persistent decode kernel shares among its phases: sizes, who owns what, the grid
// barrier, and the stream of weights and past keys through shared memory.
#pragma once

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/vector.cuh"

namespace eet_patch::cuda {

constexpr int kStepWarps = 8;
constexpr int kStepThreads = kStepWarps * kWarpSize;
constexpr int kSlotBytes = 4096;
constexpr int kMinSlots = 4, kMaxSlots = 6;  // of a warp's ring
constexpr int kMaxOwed = 3;                  // slots that wait for the end of a phase
constexpr int kMaxStepRows = 16;
constexpr int kGroupColumns = 8;   // the least share of a product: 16 bytes of each row of weights
constexpr int kMaxTileGroups = 8;  // what a warp accumulates at a time
constexpr int kStepK = 32;
constexpr int kTileKeys = 16;
constexpr int kMaxHeadDim = 128;
constexpr int kSharedTileHeadDim = 64;  // up to here 16 keys and their values share a slot
constexpr int kPartialExtra = 4;        // maximum and sum after the values; keeps 16-byte alignment

enum StepPhase : int { kQkvPhase, kAttentionPhase, kOutPhase, kFc1Phase, kFc2Phase, kNumPhases };

// What is streamed, by phase; the attention's entry is the keys, and the values follow at the end.
struct StreamedLayer {
  const void* source[kNumPhases + 1];
};

struct ProductShape {
  int in_features, out_features;
  int groups_per_block, extra_groups;  // out_features / 8 spread over the grid
};

// A row's keys [start, length) are cut into tiles of 16 from first_key on; the new token is one
// more unit of work after them.
struct StepRow {
  int start, length, first_key, tiles, first_unit;
  int64_t cache_offset;
};

template <typename T>
struct StepParams {
  T* out;
  const T* hidden_states;
  const DecodeLayer* layers;
  const int32_t *lengths, *kv_start, *cache_rows;
  unsigned* barrier;          // arrivals, departures; both zero between calls
  T *qkv, *middle, *state;    // (rows, 3 hidden); x after the attention; x after the layer
  T *inner, *normed;          // (rows, intermediate); (rows, hidden) where there is no panel
  float* partials;            // attention: (rows * heads + grid, head_dim + kPartialExtra)
  HeadStrides cache_strides;
  int rows, num_layers, num_heads, head_dim, hidden_size, intermediate_size;
  float norm_eps;
  Activation activation;
  int slots;
  int panel_stride;  // elements; 0: no panel
  int sums_offset, table_offset;
  ProductShape products[kNumPhases];
};

struct Range {
  int begin, end;
};

// The block's groups of a product. `shift` moves the blocks that own one more on from product to
// product, so that all stream the same amount over a layer.
__device__ __forceinline__ Range next_groups(const ProductShape& shape, int& shift) {
  const int blocks = gridDim.x;
  int index = static_cast<int>(blockIdx.x) - shift;
  if (index < 0) index += blocks;
  shift += shape.extra_groups;
  if (shift >= blocks) shift -= blocks;
  const int begin = index * shape.groups_per_block + min(index, shape.extra_groups);
  return {begin, begin + shape.groups_per_block + (index < shape.extra_groups ? 1 : 0)};
}

// The k of a product that a warp owns.
__device__ __forceinline__ Range warp_k(int in_features, int warp) {
  const int steps = in_features / kStepK;
  return {steps * warp / kStepWarps * kStepK, steps * (warp + 1) / kStepWarps * kStepK};
}

// Groups of the next tile when `left` remain: even parts, of whole sectors.
__device__ __forceinline__ int tile_groups(int left) {
  if (left <= kMaxTileGroups) return left;
  const int tiles = (left + kMaxTileGroups - 1) / kMaxTileGroups;
  return ((left + tiles - 1) / tiles + 1) & ~1;
}

// k of a slot that holds `groups` groups, in steps of kStepK.
__device__ __forceinline__ int slot_steps(int groups) {
  return groups > 4 ? 1 : groups > 2 ? 2 : 4;
}

// 16-byte pieces of a row move by an exclusive or of the row's number, so that the eight rows of a
// matrix fragment lie in different banks whatever the number of pieces.
struct Swizzle {
  int mask, shift;
  __device__ __forceinline__ explicit Swizzle(int pieces) {
    mask = min(pieces & -pieces, 8) - 1;
    shift = 3 - __popc(mask);
  }
  __device__ __forceinline__ int operator()(int row) const { return (row >> shift) & mask; }
};

// Where row k of 32 rows of weights lies, so that a lane's 16-byte load of the activations,
// k = 8 q .. 8 q + 7, holds its fragments of two products.
__device__ __forceinline__ int permuted_row(int k) {
  return (k & ~31) | ((k & 6) << 2) | ((k & 24) >> 2) | (k & 1);
}

// Loads that other blocks wrote during this kernel: never through L1.
__device__ __forceinline__ uint4 load_shared_state(const void* source) {
  return __ldcg(static_cast<const uint4*>(source));
}

// One thread of the block counts and spins; the counter starts at zero.
struct GridBarrier {
  unsigned* counter;
  unsigned target = 0;

  // What the block wrote before is visible to who waits.
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    }
    target += gridDim.x;
  }
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == 0) {
      unsigned seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < target);
    }
    __syncthreads();
  }
  // The last block to leave makes the counters ready for the next call.
  __device__ __forceinline__ void leave() {
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(counter + 1, 1u) == gridDim.x - 1) {
      counter[0] = 0;
      counter[1] = 0;
    }
  }
};

// A warp's own ring of slots, and the cursor of what it asks for next. It walks the warp's whole
// work of the step (every product's columns and k, every layer's past keys), which depends on
// nothing that the step computes, so the ring stays full across barriers. Consumers call wait(),
// read data(), and then release() in the same order. Asking for more takes instructions too, so
// what is released late in a phase is refilled by flush(), behind the phase's result.
template <typename T>
struct WeightStream {
  const StepParams<T>& p;
  const StreamedLayer* table;
  const StepRow* step_rows;
  unsigned char* ring;
  int lane, warp;

  int first_row, first_head, first_tile, first_left;  // the warp's attention units, of every layer

  int slot = 0, read_slot = 0, owed = 0;
  int layer = 0, phase = kQkvPhase, shift = 0;
  int group = 0, group_end = 0, groups = 0, k = 0, k_begin = 0, k_end = 0;
  int row = 0, head = 0, tile = 0, left = 0;
  bool values_next = false;

  __device__ __forceinline__ WeightStream(const StepParams<T>& params, const StreamedLayer* layers,
                                          const StepRow* rows, unsigned char* slots)
      : p(params),
        table(layers),
        step_rows(rows),
        ring(slots),
        lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize) {}

  __device__ __forceinline__ const unsigned char* data() const {
    return ring + read_slot * kSlotBytes;
  }

  __device__ __forceinline__ void wait() const {
    switch (p.slots - 1 - owed) {
      case 5:
        copy_async_wait<5>();
        break;
      case 4:
        copy_async_wait<4>();
        break;
      case 3:
        copy_async_wait<3>();
        break;
      case 2:
        copy_async_wait<2>();
        break;
      case 1:
        copy_async_wait<1>();
        break;
      default:
        copy_async_wait<0>();
    }
    __syncwarp();
  }

  __device__ __forceinline__ void release(bool late) {
    __syncwarp();
    if (++read_slot == p.slots) read_slot = 0;
    if (late && owed < kMaxOwed) {
      ++owed;
    } else {
      issue();
    }
  }

  __device__ __forceinline__ void flush() {
    for (; owed > 0; --owed) issue();
  }

  __device__ __forceinline__ void start(int unit, int units) {
    first_row = 0;
    while (first_row + 1 < p.rows && step_rows[first_row + 1].first_unit <= unit) ++first_row;
    const int units_per_head = step_rows[first_row].tiles + 1;
    const int local = unit - step_rows[first_row].first_unit;
    first_head = local / units_per_head;
    first_tile = local - first_head * units_per_head;
    first_left = units;
    enter_phase();
    for (int i = 0; i < p.slots; ++i) issue();
  }

 private:
  __device__ __forceinline__ void enter_phase() {
    if (phase == kAttentionPhase) {
      row = first_row, head = first_head, tile = first_tile, left = first_left;
      return;
    }
    const ProductShape& shape = p.products[phase];
    const Range owned = next_groups(shape, shift), steps = warp_k(shape.in_features, warp);
    group = owned.begin;
    group_end = steps.begin < steps.end ? owned.end : owned.begin;
    groups = tile_groups(group_end - group);
    k = k_begin = steps.begin;
    k_end = steps.end;
  }

  __device__ __forceinline__ void next_phase() {
    if (++phase == kNumPhases) phase = 0, ++layer;
    enter_phase();
  }

  // `count` rows of 16 * pieces bytes. Rows outside `valid` become zeros.
  template <bool kPermute>
  __device__ __forceinline__ void copy_rows(unsigned char* target, const T* source, int64_t stride,
                                            int pieces, int count, Range valid) const {
    const float reciprocal = __frcp_rn(static_cast<float>(pieces));
    const int row_step = static_cast<int>((kWarpSize + 0.5f) * reciprocal),
              piece_step = kWarpSize - row_step * pieces;
    int at = static_cast<int>((lane + 0.5f) * reciprocal), piece = lane - at * pieces;
    const Swizzle swizzle(pieces);
#pragma unroll 2
    while (at < count) {
      const int place = kPermute ? permuted_row(at) : at;
      const bool real = kPermute || (at >= valid.begin && at < valid.end);
      copy_async_16(target + (place * pieces + (piece ^ swizzle(place))) * kVectorBytes,
                    source + (real ? at * stride : 0) + piece * kGroupColumns, real);
      at += row_step;
      piece += piece_step;
      if (piece >= pieces) piece -= pieces, ++at;
    }
  }

  __device__ __forceinline__ void issue() {
    unsigned char* target = ring + slot * kSlotBytes;
    if (++slot == p.slots) slot = 0;
    while (layer < p.num_layers) {
      if (phase == kAttentionPhase) {
        if (left > 0) {
          const StepRow& info = step_rows[row];
          const bool streamed = tile < info.tiles;
          if (streamed) {
            const int first = info.first_key + tile * kTileKeys, pieces = p.head_dim / 8;
            const int64_t offset = info.cache_offset + head * p.cache_strides.head +
                                   first * p.cache_strides.token;
            const Range valid = {info.start - first, info.length - first};
            const bool both = p.head_dim <= kSharedTileHeadDim;
            const StreamedLayer& sources = table[layer];
            if (!values_next) {
              copy_rows<false>(target, static_cast<const T*>(sources.source[phase]) + offset,
                               p.cache_strides.token, pieces, kTileKeys, valid);
            }
            if (both || values_next) {
              copy_rows<false>(target + (both ? kSlotBytes / 2 : 0),
                               static_cast<const T*>(sources.source[kNumPhases]) + offset,
                               p.cache_strides.token, pieces, kTileKeys, valid);
            }
            values_next = !both && !values_next;
          }
          if (!values_next) {
            --left;
            if (++tile > info.tiles) {
              tile = 0;
              if (++head == p.num_heads) head = 0, ++row;
            }
          }
          if (streamed) break;
          continue;
        }
      } else if (group < group_end) {
        const int64_t pitch = p.products[phase].out_features;
        const int count = min(slot_steps(groups) * kStepK, k_end - k);
        copy_rows<true>(
            target,
            static_cast<const T*>(table[layer].source[phase]) + k * pitch + group * kGroupColumns,
            pitch, groups, count, {});
        k += count;
        if (k == k_end) {
          k = k_begin;
          group += groups;
          groups = tile_groups(group_end - group);
        }
        break;
      }
      next_phase();
    }
    copy_async_commit();
  }
};

}  // namespace eet_patch::cuda
