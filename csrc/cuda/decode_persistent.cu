// All layers of one decode step in one persistent kernel. A decode step reads every weight and
// every past key once, so it is bound by that stream: each warp streams its whole share of the step
// through a ring in shared memory, ahead of the phases that need it (QKV, attention, output
// projection, FC1, FC2 of each layer, with a grid barrier between), and the latencies of a phase
// pass while the next ones' weights arrive. Products use tensor cores with the weights as the n = 8
// operand and the rows of the batch as m. A block owns whole columns of a product, so no sum
// crosses blocks and two runs give the same bits.
#include "cuda/decode_persistent.cuh"

#include <algorithm>

#include "common/activation.cuh"
#include "common/row_norm.cuh"
#include "cuda/decode_persistent_attention.cuh"
#include "cuda/decode_persistent_stream.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kMaxStepLayers = 128;
constexpr int kAhead = 2;  // steps of a product whose input is loaded before it is needed
constexpr int kHeldVectors = 5;  // 16-byte vectors of a block's part of a row that a lane holds
constexpr int kSumsStride = kMaxTileGroups * kGroupColumns + 8;  // keeps rows off shared banks
// Of the 128 a thread that 512 threads are given; multiples of 8.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 200;
constexpr int kSharedLimit = 227 * 1024;
constexpr int kStaticSharedBytes = 3072;

struct Moments {
  float count, mean, squares;
};

// Layer norm of the rows, columns [columns.begin, columns.end) of them into the panel. A block reads
// those columns alone: each warp leaves the mean of its part of a row and the squares about it, and
// the cluster's parts meet in a fixed order.
template <typename T, int kRowsPerWarp>
__device__ __forceinline__ void normalise_rows(const StepParams<T>& p, const T* source,
                                               const T* weight, const T* bias, Range columns,
                                               T* panel, Moments* moments, ClusterBarrier& barrier) {
  constexpr int kVector = kVectorSize<T>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warps = p.rows == 1 ? 8 : p.rows == 2 ? 4 : p.rows <= 4 ? 2 : 1;  // of a row
  const int part = warp & (warps - 1), stride = warps * kWarpSize;
  const int vectors = (columns.end - columns.begin) / kVector, first = part * kWarpSize + lane;
  uint4 held[kRowsPerWarp][kHeldVectors];
  float values[kVector];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int row = warp / warps + r * kStepWarps;
#pragma unroll
    for (int i = 0; i < kHeldVectors; ++i) {
      const int vector = first + i * stride;
      if (vector < vectors && row < p.rows) {
        held[r][i] = load_shared_state(source + int64_t(row) * p.hidden_size + columns.begin +
                                       vector * kVector);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int row = warp / warps + r * kStepWarps;
    if (row >= p.rows) break;
    float count = 0.0f, sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeldVectors; ++i) {
      if (first + i * stride >= vectors) break;
      unpack_vector<T>(held[r][i], values);
      count += kVector;
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum += values[j];
    }
    count = warp_sum(count);
    const float mean = count == 0.0f ? 0.0f : warp_sum(sum) / count;
#pragma unroll
    for (int i = 0; i < kHeldVectors; ++i) {
      if (first + i * stride >= vectors) break;
      unpack_vector<T>(held[r][i], values);
#pragma unroll
      for (int j = 0; j < kVector; ++j) squares += (values[j] - mean) * (values[j] - mean);
    }
    squares = warp_sum(squares);
    if (lane == 0) moments[row * warps + part] = {count, mean, squares};
  }
  barrier.arrive();
  barrier.wait();
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int row = warp / warps + r * kStepWarps;
    if (row >= p.rows) break;
    Moments other = {0.0f, 0.0f, 0.0f};
    if (lane < kCluster * warps) {
      const uint32_t address =
          remote_address(moments + row * warps + lane % warps, lane / warps);
      other.count = load_remote(address);
      other.mean = load_remote(address + 4);
      other.squares = load_remote(address + 8);
    }
    const float mean = warp_sum(other.mean * (other.count / p.hidden_size));
    const float distance = other.mean - mean;
    const float squares = warp_sum(other.squares + other.count * distance * distance);
    const float scale = rsqrtf(squares / p.hidden_size + p.norm_eps);
#pragma unroll
    for (int i = 0; i < kHeldVectors; ++i) {
      const int vector = first + i * stride;
      if (vector >= vectors) break;
      unpack_vector<T>(held[r][i], values);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = (values[j] - mean) * scale;
      scale_and_shift(values, weight, bias, columns.begin + vector * kVector);
      store_vector(panel + row * p.panel_stride + vector * kVector, values);
    }
  }
}

// Asks L2 for the small parameters of a layer, spread over the grid; array by array of a thread.
template <typename T>
__device__ __forceinline__ void prefetch_parameters(const StepParams<T>& p, int layer) {
  constexpr int kLine = 128;
  if (layer >= p.num_layers || threadIdx.x >= 8) return;
  const DecodeLayer& l = p.layers[layer];
  const void* arrays[8] = {l.norm1_weight, l.norm1_bias, l.qkv_bias[0], l.out_bias,
                           l.norm2_weight, l.norm2_bias, l.fc1_bias,    l.fc2_bias};
  const void* array = nullptr;
  int size = p.hidden_size;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (static_cast<int>(threadIdx.x) == i) array = arrays[i];
  }
  if (threadIdx.x == 2) size *= 3;
  if (threadIdx.x == 6) size = p.intermediate_size;
  if (array == nullptr) return;
#pragma unroll 1
  for (int64_t at = int64_t(blockIdx.x) * kLine; at < int64_t(size) * sizeof(T);
       at += int64_t(gridDim.x) * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(array) + at));
  }
}

// One block of 8 consumer and 8 producer warps a multiprocessor, all resident (cooperative launch). Of a product a block
// owns a run of 8-column groups, and each warp of it a run of k; past keys are dealt out 16 at a
// time. Shared memory: the warps' rings, the normalised input or the attention's result where it
// fits (the panel; else blocks share the work and leave it in global memory, one more barrier), the
// warps' partial sums, and tables. Limits: those of takes_persistent_decode. Moves every weight and
// every visible past key once, and of the activations grid * rows * (3 hidden + intermediate)
// elements a layer, from L2.
template <typename T, bool kWide, int kSlices>
__global__ void __launch_bounds__(2 * kStepThreads, 1)
    decode_step_kernel(const __grid_constant__ StepParams<T> p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ StepRow step_rows[kMaxStepRows];
  __shared__ Moments moments[kMaxStepRows];
  __shared__ uint64_t cluster_barriers[2];
  __shared__ int entry_pairs[HeadEntries::kCount];
  __shared__ uint64_t full[kStepWarps * kMaxSlots], empty[kStepWarps * kMaxSlots];
  const int warp = threadIdx.x / kWarpSize % kStepWarps;  // a consumer and its producer share one
  T* panel = reinterpret_cast<T*>(shared + kStepWarps * p.slots * kSlotBytes);
  float* sums = reinterpret_cast<float*>(shared + p.sums_offset);
  StreamedLayer* table = reinterpret_cast<StreamedLayer*>(shared + p.table_offset);
  const HeadEntries entries = {entry_pairs, sums};

  if (threadIdx.x < kStepWarps * kMaxSlots) {
    slot_barrier_init(full + threadIdx.x, kWarpSize);
    slot_barrier_init(empty + threadIdx.x, 1);
  }
  if (threadIdx.x < 2) {
    slot_barrier_init(cluster_barriers + threadIdx.x, kCluster * kStepWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_layers; i += blockDim.x) {
    const DecodeLayer& layer = p.layers[i];
    table[i] = {{layer.qkv_weight[0], layer.key_cache, layer.out_weight, layer.fc1_weight,
                 layer.fc2_weight, layer.value_cache}};
  }
  if (threadIdx.x < p.rows) {
    const int row = threadIdx.x, length = p.lengths[row];
    const int start = p.kv_start == nullptr ? 0 : max(0, p.kv_start[row]);
    const int first_key = min(start, length) & ~(kTileKeys - 1);
    const int tiles = start < length ? (length - first_key + kTileKeys - 1) / kTileKeys : 0;
    const int64_t cache_row = p.cache_rows == nullptr ? row : p.cache_rows[row];
    StepRow& info = step_rows[row];
    info.start = start;
    info.length = length;
    info.first_key = first_key;
    info.tiles = tiles;
    info.cache_offset = cache_row * p.cache_strides.batch;
  }
  prefetch_parameters(p, 0);
  __syncthreads();
  AttentionUnits units = {0, 0};
#pragma unroll 1
  for (int row = 0; row < p.rows; ++row) {
    if (threadIdx.x == 0) step_rows[row].first_unit = units.total;
    units.total += p.num_heads * (step_rows[row].tiles + 1);
  }
  units.blocks = min(units.total, gridDim.x);
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  const UnitCursor first_unit(units, step_rows, p.rows, warp);
  SlotRing ring(shared + warp * p.slots * kSlotBytes, full + warp * kMaxSlots,
                empty + warp * kMaxSlots, p.slots);
  if (threadIdx.x >= kStepThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    produce(p, table, step_rows, first_unit, warp, ring);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, q = lane % 4;

  GridBarrier barrier{p.barrier};
  // Sums are written, and read, by the whole cluster.
  ClusterBarrier written{shared_address(cluster_barriers)},
      read{shared_address(cluster_barriers + 1)};
  bool unread = false;
  int shift = 0;
#pragma unroll 1
  for (int layer_index = 0; layer_index < p.num_layers; ++layer_index) {
    const DecodeLayer& layer = p.layers[layer_index];
    const T* const before = layer_index == 0 ? p.hidden_states : p.state;
#pragma unroll 1
    for (int phase = 0; phase < kNumPhases; ++phase) {
      if (phase == kAttentionPhase) {
        barrier.wait();
        attend<T, kSlices>(p, ring, step_rows, first_unit, layer, entries);
        sync_consumers();
        merge_entries(p, entries);
        barrier.arrive();
        continue;
      }
      const ProductShape& shape = p.products[phase];
      const Range owned = next_groups(shape, shift), ks = warp_k(shape.in_features, warp, 1),
                  block_ks = warp_k(shape.in_features, 0, kStepWarps);
      const T *bias, *residual = nullptr, *norm_weight = nullptr, *norm_bias = nullptr;
      T* out;
      if (phase == kQkvPhase) {
        bias = static_cast<const T*>(layer.qkv_bias[0]);
        norm_weight = static_cast<const T*>(layer.norm1_weight);
        norm_bias = static_cast<const T*>(layer.norm1_bias);
        out = p.qkv;
      } else if (phase == kOutPhase) {
        bias = static_cast<const T*>(layer.out_bias);
        residual = before;
        out = p.middle;
      } else if (phase == kFc1Phase) {
        bias = static_cast<const T*>(layer.fc1_bias);
        norm_weight = static_cast<const T*>(layer.norm2_weight);
        norm_bias = static_cast<const T*>(layer.norm2_bias);
        out = p.inner;
      } else {
        bias = static_cast<const T*>(layer.fc2_bias);
        residual = p.middle;
        out = layer_index + 1 == p.num_layers ? p.out : p.state;
      }
      if (phase != kQkvPhase || layer_index > 0) barrier.wait();
      if (phase == kQkvPhase) prefetch_parameters(p, layer_index + 1);

      const bool from_panel = phase != kFc2Phase;
      if (norm_weight != nullptr) {
        normalise_rows<T, kWide ? 2 : 1>(p, phase == kQkvPhase ? before : p.middle, norm_weight,
                                         norm_bias, block_ks, panel, moments, written);
      } else if (phase == kOutPhase) {
        combine_heads(p, step_rows, units, block_ks, panel);
      }
      if (from_panel) sync_consumers();

      const bool low_row = g < p.rows, high_row = kWide && g + 8 < p.rows;
      const int steps = (ks.end - ks.begin) / kStepK;
      const T* panel_lane = panel + g * p.panel_stride + ks.begin - block_ks.begin + 8 * q;
      const T* input_lane = p.inner + int64_t(g) * shape.in_features + ks.begin + 8 * q;
      auto load_input = [&](int step, uint4& low, uint4& high) {
        low = high = make_uint4(0, 0, 0, 0);
        if (step >= steps) return;
        const int at = step * kStepK;
        if (from_panel) {
          if (low_row) low = *reinterpret_cast<const uint4*>(panel_lane + at);
          if (high_row)
            high = *reinterpret_cast<const uint4*>(panel_lane + 8 * p.panel_stride + at);
        } else {
          if (low_row) low = load_shared_state(input_lane + at);
          if (high_row) high = load_shared_state(input_lane + 8 * shape.in_features + at);
        }
      };

#pragma unroll 1
      for (int group = owned.begin; group < owned.end;) {
        const int groups = tile_groups(owned.end - group), columns = groups * kGroupColumns;
        const int per_slot = slot_steps(groups);
        uint4 low[kAhead], high[kAhead], next_low[kAhead], next_high[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) load_input(i, low[i], high[i]);

        // The blocks of the cluster finish equal parts of the tile, an element a thread.
        const int share = (p.rows * columns + kCluster - 1) / kCluster;
        const int element = cluster_rank() * share + threadIdx.x, row = element / columns;
        const bool finishes = static_cast<int>(threadIdx.x) < share && row < p.rows;
        const int local_column = element - row * columns,
                  column = group * kGroupColumns + local_column;
        const int64_t out_at = int64_t(row) * shape.out_features + column;
        float bias_term = 0.0f, residual_term = 0.0f;
        if (finishes && bias != nullptr) bias_term = to_float(bias[column]);
        if (finishes && residual != nullptr) {
          const unsigned short bits =
              __ldcg(reinterpret_cast<const unsigned short*>(residual + out_at));
          residual_term = to_float(reinterpret_cast<const T&>(bits));
        }

        float c[kMaxTileGroups][4] = {};
        const int swizzle = Swizzle(groups)(lane);
#pragma unroll 1
        for (int first = 0; first < steps; first += kAhead) {
#pragma unroll
          for (int i = 0; i < kAhead; ++i)
            load_input(first + kAhead + i, next_low[i], next_high[i]);
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            const int step = first + i;
            if (step >= steps) break;
            const int in_slot = step & (per_slot - 1);
            if (in_slot == 0) ring.wait_full();
            const unsigned char* weights =
                ring.data() + (in_slot * kStepK + lane) * groups * kVectorBytes;
            uint32_t w[kMaxTileGroups][4];
#pragma unroll
            for (int j = 0; j < kMaxTileGroups; ++j) {
              if (j >= groups) break;
              ldmatrix_x4_trans(w[j], weights + (j ^ swizzle) * kVectorBytes);
            }
#pragma unroll
            for (int j = 0; j < kMaxTileGroups; ++j) {
              if (j >= groups) break;
              mma_m16n8k16<T>(c[j], low[i].x, high[i].x, low[i].y, high[i].y, w[j][0], w[j][1]);
              mma_m16n8k16<T>(c[j], low[i].z, high[i].z, low[i].w, high[i].w, w[j][2], w[j][3]);
            }
            if (in_slot == per_slot - 1 || step == steps - 1) ring.release();
          }
#pragma unroll
          for (int i = 0; i < kAhead; ++i) low[i] = next_low[i], high[i] = next_high[i];
        }

        if (unread) read.wait();
        float* mine = sums + warp * p.rows * kSumsStride + 2 * q;
#pragma unroll
        for (int j = 0; j < kMaxTileGroups; ++j) {
          if (j >= groups) break;
          if (low_row) {
            *reinterpret_cast<float2*>(mine + g * kSumsStride + j * kGroupColumns) =
                make_float2(c[j][0], c[j][1]);
          }
          if (high_row) {
            *reinterpret_cast<float2*>(mine + (g + 8) * kSumsStride + j * kGroupColumns) =
                make_float2(c[j][2], c[j][3]);
          }
        }
        written.arrive();
        written.wait();
        if (finishes) {
          float sum = 0.0f;
#pragma unroll 1
          for (int rank = 0; rank < kCluster; ++rank) {
            const uint32_t from = remote_address(sums + row * kSumsStride + local_column, rank);
            float parts[kStepWarps];
#pragma unroll
            for (int w = 0; w < kStepWarps; ++w)
              parts[w] = load_remote(from + w * p.rows * kSumsStride * 4);
#pragma unroll
            for (int w = 0; w < kStepWarps; ++w) sum += parts[w];
          }
          sum += bias_term;
          if (phase == kFc1Phase) sum = activate(sum, p.activation);
          out[out_at] = from_float<T>(sum + residual_term);
        }
        read.arrive();
        unread = true;
        group += groups;
      }
      if (phase != kFc2Phase || layer_index + 1 < p.num_layers) barrier.arrive();
    }
  }
  if (unread) read.wait();  // nobody leaves while its sums are read
  barrier.leave();
#endif
}

struct SharedLayout {
  int slots = 0, panel_stride = 0, sums_offset = 0, table_offset = 0, bytes = 0;
};

// The longest ring that fits beside the rest.
SharedLayout shared_layout(const DecodeLayersArgs& args) {
  const int rows = static_cast<int>(args.rows);
  const int hidden = static_cast<int>(args.num_heads * args.head_dim);
  const int sums = std::max(kStepWarps * rows * kSumsStride,
                            HeadEntries::kCount * static_cast<int>(args.head_dim + kPartialExtra)) *
                   4;
  const int table = static_cast<int>(args.num_layers * sizeof(StreamedLayer));
  // 64 bytes over a multiple of 128, so that rows alternate between halves of the banks.
  const int stride =
      static_cast<int>(round_up(ceil_div(hidden / kStepK, kCluster) * kStepK, 64)) + 32;
  const int panel = rows * stride * 2;
  SharedLayout layout;
  for (int slots = kMaxSlots; slots >= kMinSlots; --slots) {
    const int ring = kStepWarps * slots * kSlotBytes;
    const int bytes = ring + panel + sums + table;
    if (bytes + kStaticSharedBytes > kSharedLimit) continue;
    layout.slots = slots;
    layout.panel_stride = stride;
    layout.sums_offset = ring + panel;
    layout.table_offset = ring + panel + sums;
    layout.bytes = bytes;
    break;
  }
  return layout;
}

struct WorkspaceLayout {
  int64_t barrier, qkv, middle, state, inner, partials, bytes;
};

WorkspaceLayout workspace_layout(const DecodeLayersArgs& args, int64_t blocks) {
  const int64_t hidden = args.num_heads * args.head_dim, row_bytes = args.rows * 2;
  WorkspaceLayout layout = {};
  int64_t at = 0;
  auto take = [&](int64_t bytes) {
    const int64_t offset = at;
    at += workspace_part(bytes);
    return offset;
  };
  layout.barrier = take(2 * sizeof(unsigned));
  layout.qkv = take(3 * hidden * row_bytes);
  layout.middle = take(hidden * row_bytes);
  layout.state = take(hidden * row_bytes);
  layout.inner = take(args.intermediate_size * row_bytes);
  layout.partials = take((args.rows * args.num_heads + blocks) * (args.head_dim + kPartialExtra) *
                         int64_t(sizeof(float)));
  layout.bytes = at;
  return layout;
}

int step_blocks() { return device_attribute(cudaDevAttrMultiProcessorCount); }

bool layer_fits(const DecodeLayer& layer) {
  const void* addresses[] = {layer.norm1_weight, layer.norm1_bias,  layer.qkv_weight[0],
                             layer.out_weight,   layer.norm2_weight, layer.norm2_bias,
                             layer.fc1_weight,   layer.fc2_weight,  layer.key_cache,
                             layer.value_cache};
  for (const void* address : addresses) {
    if (!is_aligned(address)) return false;
  }
  return layer.norm1_weight != nullptr && layer.norm2_weight != nullptr;
}

// As many clusters as are resident at once.
template <typename T, bool kWide, int kSlices>
cudaError_t launch_step(StepParams<T> params, int shared_bytes, cudaStream_t stream) {
  auto kernel = decode_step_kernel<T, kWide, kSlices>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(step_blocks()));
    config.blockDim = dim3(2 * kStepThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = kCluster;
    attributes[0].val.clusterDim.y = 1;
    attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
    config.attrs = attributes;
    config.numAttrs = 1;
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error == cudaSuccess && clusters < 1) error = cudaErrorCooperativeLaunchTooLarge;
    if (error == cudaSuccess) {
      clusters = std::min(clusters, step_blocks() / kCluster);
      config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
      config.numAttrs = 2;
      auto shape = [&](int in_features, int out_features) {
        const int groups = out_features / kGroupColumns;
        return ProductShape{in_features, out_features, groups / clusters, groups % clusters};
      };
      const int hidden = params.hidden_size, inner = params.intermediate_size;
      params.products[kQkvPhase] = shape(hidden, 3 * hidden);
      params.products[kOutPhase] = shape(hidden, hidden);
      params.products[kFc1Phase] = shape(hidden, inner);
      params.products[kFc2Phase] = shape(inner, hidden);
      error = cudaLaunchKernelEx(&config, kernel, params);
    }
  }
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

}  // namespace

bool takes_persistent_decode(const DecodeLayersArgs& args) {
  const int64_t hidden = args.num_heads * args.head_dim;
  if (args.dtype == DType::kFloat32 || !args.in_out || args.num_qkv_weights != 1) return false;
  if (args.key_rows != nullptr || args.rows < 1 || args.rows > kMaxStepRows) return false;
  if (args.num_layers < 1 || args.num_layers > kMaxStepLayers) return false;
  if (hidden < 64 || hidden % 64 != 0 || args.head_dim % 16 != 0 || args.head_dim > kMaxHeadDim)
    return false;
  if (args.intermediate_size < 64 || args.intermediate_size % 64 != 0) return false;
  const HeadStrides& strides = args.cache_strides;
  if (strides.batch % 8 != 0 || strides.head % 8 != 0 || strides.token % 8 != 0) return false;
  if (!is_aligned(args.hidden_states) || !is_aligned(args.out)) return false;
  for (int64_t i = 0; i < args.num_layers; ++i) {
    if (!layer_fits(args.layers[i])) return false;
  }
  const int64_t blocks = step_blocks();
  const int64_t units = args.rows * args.num_heads * (args.max_kv_len / kTileKeys + 2);
  constexpr int64_t kMaxIndex = int64_t(1) << 31;
  if (blocks < kCluster || (units + 1) * blocks >= kMaxIndex) return false;
  if (3 * hidden >= kMaxIndex / kMaxStepRows || args.intermediate_size >= kMaxIndex / kMaxStepRows)
    return false;
  // A warp or more normalises the block's part of a row from its registers.
  const int64_t warps = args.rows == 1 ? 8 : args.rows == 2 ? 4 : args.rows <= 4 ? 2 : 1;
  if (ceil_div(hidden / kStepK, kCluster) * kStepK > kHeldVectors * warps * kWarpSize * 8)
    return false;
  if (shared_layout(args).slots == 0) return false;
  return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kSharedLimit &&
         device_attribute(cudaDevAttrCooperativeLaunch) != 0;
}

int64_t persistent_decode_workspace_bytes(const DecodeLayersArgs& args) {
  return workspace_layout(args, step_blocks()).bytes;
}

template <typename T>
cudaError_t launch_persistent_decode(const DecodeLayersArgs& args, cudaStream_t stream) {
  const WorkspaceLayout workspace = workspace_layout(args, step_blocks());
  if (args.workspace == nullptr || args.workspace_bytes < workspace.bytes)
    return cudaErrorInvalidValue;
  const SharedLayout layout = shared_layout(args);
  unsigned char* base = static_cast<unsigned char*>(args.workspace);
  StepParams<T> p = {};
  p.out = static_cast<T*>(args.out);
  p.hidden_states = static_cast<const T*>(args.hidden_states);
  p.layers = args.device_layers;
  p.lengths = args.lengths;
  p.kv_start = args.kv_start;
  p.cache_rows = args.cache_rows;
  p.barrier = reinterpret_cast<unsigned*>(base + workspace.barrier);
  p.qkv = reinterpret_cast<T*>(base + workspace.qkv);
  p.middle = reinterpret_cast<T*>(base + workspace.middle);
  p.state = reinterpret_cast<T*>(base + workspace.state);
  p.inner = reinterpret_cast<T*>(base + workspace.inner);
  p.partials = reinterpret_cast<float*>(base + workspace.partials);
  p.cache_strides = args.cache_strides;
  p.rows = static_cast<int>(args.rows);
  p.num_layers = static_cast<int>(args.num_layers);
  p.num_heads = static_cast<int>(args.num_heads);
  p.head_dim = static_cast<int>(args.head_dim);
  p.hidden_size = p.num_heads * p.head_dim;
  p.intermediate_size = static_cast<int>(args.intermediate_size);
  p.norm_eps = args.norm_eps;
  p.activation = args.activation;
  p.slots = layout.slots;
  p.panel_stride = layout.panel_stride;
  p.sums_offset = layout.sums_offset;
  p.table_offset = layout.table_offset;
  const bool wide = p.rows > 8;
  if (p.head_dim <= kSharedTileHeadDim) {
    return wide ? launch_step<T, true, 4>(p, layout.bytes, stream)
                : launch_step<T, false, 4>(p, layout.bytes, stream);
  }
  return wide ? launch_step<T, true, 8>(p, layout.bytes, stream)
              : launch_step<T, false, 8>(p, layout.bytes, stream);
}

template cudaError_t launch_persistent_decode<__half>(const DecodeLayersArgs&, cudaStream_t);
template cudaError_t launch_persistent_decode<__nv_bfloat16>(const DecodeLayersArgs&, cudaStream_t);

}  // namespace eet_patch::cuda
