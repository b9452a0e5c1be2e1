// Product of up to some hundred rows for fp16 and bf16 on sm_90a, where what counts is the time
// from the end of the kernel ahead to this one's: blocks are small enough that those of the next
// launch stand beside them and bring their weights meanwhile (programmatic dependent launch).
// The blocks of a cluster split the k of a tile, and share the rows that they multiply: each of
// those that own the same k and different columns brings a part of the input to all of them. A
// warp's partial sums go to the same warp of the block that finishes the columns, and count at a
// barrier of its own there, so that no warp waits for another's rows. They are added in a fixed
// order.
#pragma once

#include "cuda/linear_tiles.cuh"

namespace eet_patch::cuda {

constexpr int kClusterThreads = (kTileWarps + 1) * kWarpSize;  // the last warp brings tiles
constexpr int kClusterRows = 128, kClusterColumns = 64;
constexpr int kClusterInputBytes = kClusterRows * kSwizzleBytes;
constexpr int kClusterWeightBytes = kClusterColumns * kSwizzleBytes;
constexpr int kMaxClusterWeightStages = 16, kMaxClusterInputStages = 12;

// How a launch is laid out. Cluster rank = sharer * ranks + rank of k.
struct ClusterPlan {
  int ranks, sharers;
  int k_per_rank;  // blocks of kTileK
  int weight_stages, input_stages;
  int groups;           // of 8 columns that a rank finishes, at most
  int received_stages;  // input stages that received sums take the place of
  bool weights_first;   // the kernel ahead wrote none of the weights and biases
  size_t shared_bytes;
};

// A warp's sums of 8 columns: a vector a lane, of 2 columns of rows g and g + 8.
constexpr int kGroupBytes = kWarpSize * kVectorBytes;

// The largest rings that fit in `room` bytes a block, weights first; false where none do.
inline bool plan_cluster(ClusterPlan* plan, int k_blocks, int room) {
  constexpr int kWeightBytes = kClusterWeightBytes, kAllGroups = kClusterColumns / 8;
  plan->k_per_rank = (k_blocks + plan->ranks - 1) / plan->ranks;
  plan->groups = (kAllGroups + plan->ranks - 1) / plan->ranks;
  const int received = plan->groups * plan->ranks * kTileWarps * kGroupBytes;
  plan->received_stages = (received + kClusterInputBytes - 1) / kClusterInputBytes;
  const auto barrier_bytes = [](int weight_stages, int input_stages) {
    return 8 * (2 * (weight_stages + input_stages) + kTileWarps);
  };
  room -= barrier_bytes(kMaxClusterWeightStages, kMaxClusterInputStages);
  constexpr int kGoodInputStages = 4;  // 64 KB on their way cover the latency of the L2
  const int most_input = std::min(plan->k_per_rank, kMaxClusterInputStages);
  const int least_input = std::max(plan->received_stages, std::min(most_input, kGoodInputStages));
  plan->weight_stages = std::min({plan->k_per_rank, kMaxClusterWeightStages,
                                  (room - least_input * kClusterInputBytes) / kWeightBytes});
  plan->input_stages = std::max(
      least_input,
      std::min(most_input, (room - plan->weight_stages * kWeightBytes) / kClusterInputBytes));
  plan->shared_bytes = plan->weight_stages * kWeightBytes +
                       plan->input_stages * kClusterInputBytes +
                       barrier_bytes(plan->weight_stages, plan->input_stages);
  return plan->weight_stages > 0;
}

// As push() of cluster.cuh, 16 bytes.
__device__ __forceinline__ void push_vector(uint32_t target, const float* values,
                                            uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(target),
      "r"(__float_as_uint(values[0])), "r"(__float_as_uint(values[1])),
      "r"(__float_as_uint(values[2])), "r"(__float_as_uint(values[3])), "r"(barrier)
      : "memory");
#endif
}

__device__ __forceinline__ float2 load_shared_pair(uint32_t source) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(pair.x), "=f"(pair.y)
               : "r"(source)
               : "memory");
  return pair;
}

// A ring of stages: which comes next, and the parity of its barriers' phase.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Addresses in the shared memory of a block: the weights' ring, the inputs' ring, barriers. The
// last input_stages blocks of k lie in stages 0, 1, ... of the inputs' ring, in this order, so that
// received sums may take the first ones' place soon.
struct ClusterShared {
  uint32_t weights, inputs, barriers;
  int weight_stages, input_stages, turn;

  __device__ __forceinline__ ClusterShared(uint32_t base, const ClusterPlan& plan, int k_blocks)
      : weights(base),
        inputs(weights + plan.weight_stages * kClusterWeightBytes),
        barriers(inputs + plan.input_stages * kClusterInputBytes),
        weight_stages(plan.weight_stages),
        input_stages(plan.input_stages),
        turn((plan.input_stages - k_blocks % plan.input_stages) % plan.input_stages) {}
  __device__ __forceinline__ uint32_t weight(int stage) const {
    return weights + stage * kClusterWeightBytes;
  }
  __device__ __forceinline__ uint32_t input(int stage) const {
    const int place = stage + turn;
    return inputs + (place < input_stages ? place : place - input_stages) * kClusterInputBytes;
  }
  __device__ __forceinline__ uint32_t weight_full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t input_full(int stage) const {
    return weight_full(weight_stages + stage);
  }
  __device__ __forceinline__ uint32_t weight_empty(int stage) const {
    return input_full(input_stages + stage);
  }
  __device__ __forceinline__ uint32_t input_empty(int stage) const {
    return weight_empty(weight_stages + stage);
  }
  __device__ __forceinline__ uint32_t arrived(int warp) const {
    return input_empty(input_stages + warp);
  }
};

// A cluster owns a tile of 128 rows by kN columns of one weight, or `sharers` of them side by side,
// the last of which may lie outside: copies yield zeros there, and nothing is stored. Each rank
// owns k_per_rank blocks of its k, and finishes `groups` times 8 of its columns. Two warpgroups
// multiply 64 rows each. Limits: those of linear_tile_kernel; clusters of 2 to 8, of 2 or more
// ranks.
// Who may leave when: all blocks of a cluster go through its barrier after their last access to
// another's shared memory and before they end.
template <typename T>
__global__ void __launch_bounds__(kClusterThreads, 2)
    linear_cluster_kernel(const __grid_constant__ LinearTileParams<T> p, const ClusterPlan plan) {
#if EET_HAS_WARPGROUP_PRODUCTS
  constexpr int kN = kClusterColumns, kGroups = kN / 8,
                kPairs = kGroups / 4;  // pairs: of groups a rank finishes
  static_assert(kGroups % 4 == 0);
  extern __shared__ __align__(kBoxAlignment) unsigned char shared[];
  const int ranks = plan.ranks, sharers = plan.sharers, groups = plan.groups;
  const int member = cluster_rank(), sharer = member / ranks, rank = member - sharer * ranks;
  const int tile = blockIdx.x / (ranks * sharers);
  const int columns_of_tiles = (p.column_blocks * p.num_weights + sharers - 1) / sharers;
  const int row_from = tile / columns_of_tiles * kClusterRows;
  const int column_block = tile % columns_of_tiles * sharers + sharer;
  const int which = min(column_block / p.column_blocks, p.num_weights - 1);
  const int column_from = (column_block - which * p.column_blocks) * kN;
  const int k_begin = rank * plan.k_per_rank;
  const int k_blocks = max(0, min(p.k_blocks - k_begin, plan.k_per_rank));
  const ClusterShared at(shared_address(shared), plan, k_blocks);
  const int first_group = rank * groups, own_groups = max(0, min(kGroups - first_group, groups));
  // Broadcast, so that the compiler knows it to be the same in a warp.
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);
  const int lane = threadIdx.x % kWarpSize;

  if (warp == kTileWarps) {
#pragma unroll 1
    for (int i = lane; i < at.weight_stages; i += kWarpSize) {
      barrier_init(at.weight_full(i), 1);
      barrier_init(at.weight_empty(i), kTileWarps);
    }
#pragma unroll 1
    for (int i = lane; i < at.input_stages; i += kWarpSize) {
      barrier_init(at.input_full(i), 1);
      barrier_init(at.input_empty(i), kTileWarps * sharers);
    }
    if (lane < kTileWarps) barrier_init(at.arrived(lane), 1);
    barrier_init_fence();
    __syncwarp();
  }
  __syncthreads();
  cluster_arrive();
  release_dependents();

  if (warp == kTileWarps) {
    const CUtensorMap* weight_map = p.weight + which;
    RingPosition weight, input;
    const auto bring_weight = [&](int block) {
      barrier_expect(at.weight_full(weight.stage), kClusterWeightBytes);
      copy_box(at.weight(weight.stage), weight_map, (k_begin + block) * kTileK, column_from,
               at.weight_full(weight.stage));
      weight.advance(at.weight_stages);
    };
    const int ready = min(k_blocks, at.weight_stages);
    if (lane == 0) {
      prefetch_map(&p.input);
      if (plan.weights_first) {
#pragma unroll 1
        for (int block = 0; block < ready; ++block) bring_weight(block);
#pragma unroll 1
        for (int block = ready; block < k_blocks && column_from < p.out_features; ++block)
          prefetch_box(weight_map, (k_begin + block) * kTileK, column_from);
      }
    }
    __syncwarp();
    cluster_wait();  // all barriers of the cluster are set up
    if (lane == 0) {
      wait_for_predecessor();
      if (!plan.weights_first) {
#pragma unroll 1
        for (int block = 0; block < ready; ++block) bring_weight(block);
      }
      const int lines = kClusterRows / sharers, line_from = sharer * lines;
      const uint16_t members =
          (sharers == 4 ? 1 | 1 << ranks | 1 << 2 * ranks | 1 << 3 * ranks : 1 | 1 << ranks)
          << rank;
#pragma unroll 1
      for (int block = 0; block < k_blocks; ++block) {
        if (block >= at.weight_stages) {
          barrier_wait(at.weight_empty(weight.stage), weight.parity ^ 1);
          bring_weight(block);
        }
        const uint32_t barrier = at.input_full(input.stage);
        if (block >= at.input_stages) barrier_wait(at.input_empty(input.stage), input.parity ^ 1);
        barrier_expect(barrier, kClusterInputBytes);
        const uint32_t target = at.input(input.stage) + line_from * kSwizzleBytes;
        const int k = (k_begin + block) * kTileK;
        copy_box_to_members(target, &p.input, k, row_from + line_from, barrier, members);
        input.advance(at.input_stages);
      }
    }
    __syncwarp();
    // Not earlier, though this warp reads nothing where received sums will stand: racecheck lets a
    // warp go on from an arrival when all of the block have come to it, and others' wait for
    // copies.
    cluster_arrive();
    cluster_wait();
    cluster_arrive();
    cluster_wait();
    return;
  }

  // The lane's row and group of a pair, when its warp finishes its rows.
  const int row = row_from + warp * 16 + lane % 16, group = lane / 16;
  const int column = column_from + (first_group + group) * 8;
  const bool has_rows = row_from + warp * 16 < p.rows;
  const auto finishes = [&](int pair) {
    return row < p.rows && 2 * pair + group < own_groups && column + 16 * pair < p.out_features;
  };
  const T* bias = p.bias[which];
  const int64_t out_from = row * p.out_stride + int64_t(which) * p.out_features + column;
  uint4 biases[kPairs], residuals[kPairs];
  const auto load_biases = [&] {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      biases[pair] = make_uint4(0, 0, 0, 0);
      if (bias != nullptr && finishes(pair)) biases[pair] = load_input(bias + column + 16 * pair);
    }
  };
  if (plan.weights_first) load_biases();
  if (lane == 0) barrier_expect(at.arrived(warp), own_groups * (ranks - 1) * kGroupBytes);
  __syncwarp();
  // Once this many blocks of k are done, received sums may come.
  const int keeps = max(0, k_blocks - at.input_stages + plan.received_stages);
  cluster_wait();
  if (keeps == 0) cluster_arrive();
  wait_for_predecessor();
  if (!plan.weights_first) load_biases();
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    residuals[pair] = make_uint4(0, 0, 0, 0);
    if (p.residual != nullptr && finishes(pair))
      residuals[pair] = load_input(p.residual + out_from + 16 * pair);
  }

  float sums[kN / 2];
  if (k_blocks == 0) {
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
  }
  RingPosition weight, input;
  int weight_done = 0, input_done = 0;
  // Of the stages of a block that all products have read.
  const auto leave = [&](int block) {
    if (block + at.weight_stages < k_blocks && lane == 0)
      barrier_arrive(at.weight_empty(weight_done));
    if (block + at.input_stages < k_blocks && lane < sharers)
      barrier_arrive_at(at.input_empty(input_done), lane * ranks + rank);
    __syncwarp();
    if (block + 1 == keeps) cluster_arrive();
  };
#pragma unroll 1
  for (int block = 0; block < k_blocks; ++block) {
    barrier_wait(at.weight_full(weight.stage), weight.parity);
    barrier_wait(at.input_full(input.stage), input.parity);
    const uint64_t a = tile_descriptor(at.input(input.stage) + warp / 4 * 64 * kSwizzleBytes);
    const uint64_t b = tile_descriptor(at.weight(weight.stage));
    keep_in_place(sums);
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
      WarpgroupProduct<T, kN>::add(sums, a + step * kDescriptorStep, b + step * kDescriptorStep,
                                   block != 0 || step != 0);
    }
    warpgroup_commit();
    keep_in_place(sums);
    warpgroup_wait<1>();
    if (block != 0) leave(block - 1);
    weight_done = weight.stage, input_done = input.stage;
    weight.advance(at.weight_stages);
    input.advance(at.input_stages);
  }
  warpgroup_wait<0>();
  keep_in_place(sums);
  if (k_blocks != 0) leave(k_blocks - 1);

  // Received sums: by group of the rank that finishes it, rank that they are from, warp; a lane's
  // vectors are turned so that those who read columns of 8 rows find them in different banks.
  cluster_wait();
  const auto place = [&](int own_group, int from) {
    return at.inputs + ((own_group * ranks + from) * kTileWarps + warp) * kGroupBytes;
  };
  if (has_rows) {
    const uint32_t vector = (lane / 4 * 4 + (lane % 4 + lane / 8) % 4) * kVectorBytes;
    int owner = 0, own_group = 0;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const uint32_t target = place(own_group, rank) + vector;
      if (owner == rank) {
        store_shared(
            target, make_uint4(__float_as_uint(sums[4 * j]), __float_as_uint(sums[4 * j + 1]),
                               __float_as_uint(sums[4 * j + 2]), __float_as_uint(sums[4 * j + 3])));
      } else {
        const int to = sharer * ranks + owner;
        push_vector(address_in_rank(target, to), sums + 4 * j,
                    address_in_rank(at.arrived(warp), to));
      }
      if (++own_group == groups) own_group = 0, ++owner;
    }
  }
  __syncwarp();
  cluster_arrive();

  if (has_rows && own_groups > 0) {
    barrier_wait(at.arrived(warp), 0);
    const int line = lane % 8;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (!finishes(pair)) continue;
      float values[8];
      unpack_vector<T>(biases[pair], values);
#pragma unroll 1
      for (int from = 0; from < ranks; ++from) {
        const uint32_t source =
            place(2 * pair + group, from) + line * 4 * kVectorBytes + lane % 16 / 8 * 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 part = load_shared_pair(source + (i + line / 2) % 4 * kVectorBytes);
          values[2 * i] += part.x;
          values[2 * i + 1] += part.y;
        }
      }
      if (p.activation == Activation::kGeluErf) {
        gelu_fast(values);
      } else if (p.activation != Activation::kNone) {
#pragma unroll
        for (float& value : values) value = activate_out_of_line(value, p.activation);
      } else {
        float other[8];
        unpack_vector<T>(residuals[pair], other);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] += other[i];
      }
      store_vector(p.out + out_from + 16 * pair, values);
    }
  }
  __syncwarp();
  cluster_wait();
#else
  __trap();  // never silently nothing
#endif
}

}  // namespace eet_patch::cuda
