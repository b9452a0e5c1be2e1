// What the persistent decode kernel shares among its phases: sizes, who owns what, the grid
// barrier, and the stream of weights and past keys through shared memory.
#pragma once

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/vector.cuh"

namespace eet_patch::cuda {

constexpr int kStepWarps = 8;
constexpr int kStepThreads = kStepWarps * kWarpSize;  // consumers; as many producers beside them
constexpr int kCluster = 4;  // blocks that share the columns of a product and split its k
constexpr int kSlotBytes = 4096;
constexpr int kMinSlots = 4, kMaxSlots = 6;  // of a warp's ring
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
  int groups_per_cluster, extra_groups;  // out_features / 8 spread over the grid
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
  T* inner;                   // (rows, intermediate)
  float* partials;            // attention: (rows * heads + grid, head_dim + kPartialExtra)
  HeadStrides cache_strides;
  int rows, num_layers, num_heads, head_dim, hidden_size, intermediate_size;
  float norm_eps;
  Activation activation;
  int slots;
  int panel_stride;  // elements
  int sums_offset, table_offset;
  ProductShape products[kNumPhases];
};

struct Range {
  int begin, end;
};

// The cluster's groups of a product. `shift` moves the clusters that own one more on from product
// to product, so that all stream the same amount over a layer.
__device__ __forceinline__ Range next_groups(const ProductShape& shape, int& shift) {
  const int clusters = gridDim.x / kCluster;
  int index = static_cast<int>(blockIdx.x / kCluster) - shift;
  if (index < 0) index += clusters;
  shift += shape.extra_groups;
  if (shift >= clusters) shift -= clusters;
  const int begin = index * shape.groups_per_cluster + min(index, shape.extra_groups);
  return {begin, begin + shape.groups_per_cluster + (index < shape.extra_groups ? 1 : 0)};
}

__device__ __forceinline__ int cluster_rank() { return blockIdx.x % kCluster; }

// The k of a product that a block and a warp of it own.
__device__ __forceinline__ Range warp_k(int in_features, int first_warp, int warps) {
  constexpr int kWarps = kCluster * kStepWarps;
  const int steps = in_features / kStepK, begin = cluster_rank() * kStepWarps + first_warp;
  return {steps * begin / kWarps * kStepK, steps * (begin + warps) / kWarps * kStepK};
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

// Among the consumers of a block.
__device__ __forceinline__ void sync_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kStepThreads) : "memory");
}

// One thread of the block counts and spins; the counter starts at zero.
struct GridBarrier {
  unsigned* counter;
  unsigned target = 0;

  // What the block wrote before is visible to who waits.
  __device__ __forceinline__ void arrive() {
    sync_consumers();
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
    sync_consumers();
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

// Among the consumers of a cluster: every warp arrives at every block's barrier and waits at its own.
// What a warp wrote to shared memory before arrive() is seen after wait() by the whole cluster.
struct ClusterBarrier {
  uint32_t barrier;
  int parity = 0;
  __device__ __forceinline__ void arrive() const {
#if __CUDA_ARCH__ >= 900
    __syncwarp();
    const int lane = threadIdx.x % kWarpSize;
    if (lane < kCluster) {
      uint32_t remote;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(barrier), "r"(lane));
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote)
                   : "memory");
    }
#endif
  }
  __device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni ready;\n"
        "bra.uni wait;\n"
        "ready:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
#endif
    parity ^= 1;
  }
};

// A float of another block of the cluster.
__device__ __forceinline__ float load_remote(uint32_t address) {
  float value = 0.0f;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}
__device__ __forceinline__ uint32_t remote_address(const void* pointer, int rank) {
  uint32_t remote = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote)
               : "r"(shared_address(pointer)), "r"(rank));
#endif
  return remote;
}

// Units of attention (16 keys of one head of one row, or its new token) lie in the order row, head,
// key and are dealt out evenly: a block owns units [begin(b), begin(b + 1)), and its warps likewise.
struct AttentionUnits {
  unsigned total, blocks;  // blocks that own any: min(total, grid)
  __device__ __forceinline__ int begin(unsigned block) const {
    return static_cast<int>(total * min(block, blocks) / blocks);
  }
  __device__ __forceinline__ int block_of(int unit) const {
    return static_cast<int>(((unit + 1u) * blocks - 1u) / total);
  }
};

struct UnitCursor {
  int row, head, tile, left;

  // A warp's first unit.
  __device__ __forceinline__ UnitCursor(const AttentionUnits& units, const StepRow* rows,
                                        int row_count, int warp) {
    const int begin = units.begin(blockIdx.x), count = units.begin(blockIdx.x + 1) - begin;
    const int unit = begin + count * warp / kStepWarps;
    left = begin + count * (warp + 1) / kStepWarps - unit;
    row = 0;
    while (row + 1 < row_count && rows[row + 1].first_unit <= unit) ++row;
    const int units_per_head = rows[row].tiles + 1, local = unit - rows[row].first_unit;
    head = local / units_per_head;
    tile = local - head * units_per_head;
  }
};

__device__ __forceinline__ void slot_barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

__device__ __forceinline__ void slot_barrier_wait(uint32_t barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra.uni ready;\n"
      "bra.uni wait;\n"
      "ready:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// The ring of one consumer warp and the producer warp that fills it. Both walk the same sequence of
// slots: every product's columns and k, every layer's past keys. That depends on nothing that the
// step computes, so the producer runs ahead and the ring stays full across barriers.
struct SlotRing {
  unsigned char* slots;
  uint32_t full, empty;  // shared addresses of the first of `count` barriers
  int count;
  int at = 0, parity = 0;

  __device__ __forceinline__ SlotRing(unsigned char* data, const uint64_t* full_barriers,
                                      const uint64_t* empty_barriers, int slot_count)
      : slots(data),
        full(shared_address(full_barriers)),
        empty(shared_address(empty_barriers)),
        count(slot_count) {}

  __device__ __forceinline__ unsigned char* data() const { return slots + at * kSlotBytes; }
  __device__ __forceinline__ void advance() {
    if (++at == count) at = 0, parity ^= 1;
  }
  __device__ __forceinline__ void wait_full() const { slot_barrier_wait(full + 8 * at, parity); }
  __device__ __forceinline__ void wait_empty() const {
    slot_barrier_wait(empty + 8 * at, parity ^ 1);
  }
  // Consumer: the warp has read the slot.
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) {
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(empty + 8 * at) : "memory");
    }
    advance();
  }
  // Producer: the slot is full once this lane's copies have come (each lane counts).
  __device__ __forceinline__ void publish() {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full + 8 * at)
                 : "memory");
#endif
    advance();
  }
};

// `count` rows of 16 * pieces bytes by a warp. Rows outside `valid` become zeros; kPermute is for
// weights, whose rows are all valid.
template <bool kPermute, typename T>
__device__ __forceinline__ void copy_rows(unsigned char* target, const T* source, int64_t stride,
                                          int pieces, int count, Range valid) {
  const int lane = threadIdx.x % kWarpSize;
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

// A producer warp: streams its consumer's whole share of the step.
template <typename T>
__device__ __forceinline__ void produce(const StepParams<T>& p, const StreamedLayer* table,
                                        const StepRow* rows, const UnitCursor& first_unit, int warp,
                                        SlotRing ring) {
  const int head_pieces = p.head_dim / kGroupColumns;
  const bool both = p.head_dim <= kSharedTileHeadDim;
  int shift = 0;
  for (int layer = 0; layer < p.num_layers; ++layer) {
    for (int phase = 0; phase < kNumPhases; ++phase) {
      const T* source = static_cast<const T*>(table[layer].source[phase]);
      if (phase == kAttentionPhase) {
        const T* values = static_cast<const T*>(table[layer].source[kNumPhases]);
        UnitCursor unit = first_unit;
        for (; unit.left > 0; --unit.left) {
          const StepRow& info = rows[unit.row];
          if (unit.tile < info.tiles) {
            const int first = info.first_key + unit.tile * kTileKeys;
            const int64_t offset = info.cache_offset + unit.head * p.cache_strides.head +
                                   first * p.cache_strides.token;
            const Range valid = {info.start - first, info.length - first};
            ring.wait_empty();
            copy_rows<false>(ring.data(), source + offset, p.cache_strides.token, head_pieces,
                             kTileKeys, valid);
            if (!both) {
              ring.publish();
              ring.wait_empty();
            }
            copy_rows<false>(ring.data() + (both ? kSlotBytes / 2 : 0), values + offset,
                             p.cache_strides.token, head_pieces, kTileKeys, valid);
            ring.publish();
          }
          if (++unit.tile > info.tiles) {
            unit.tile = 0;
            if (++unit.head == p.num_heads) unit.head = 0, ++unit.row;
          }
        }
        continue;
      }
      const ProductShape& shape = p.products[phase];
      const Range owned = next_groups(shape, shift), ks = warp_k(shape.in_features, warp, 1);
      const int64_t pitch = shape.out_features;
      for (int group = owned.begin; group < owned.end;) {
        const int groups = tile_groups(owned.end - group), slot_k = slot_steps(groups) * kStepK;
        for (int k = ks.begin; k < ks.end; k += slot_k) {
          ring.wait_empty();
          copy_rows<true>(ring.data(), source + k * pitch + group * kGroupColumns, pitch, groups,
                          min(slot_k, ks.end - k), {});
          ring.publish();
        }
        group += groups;
      }
    }
  }
}

}  // namespace eet_patch::cuda
