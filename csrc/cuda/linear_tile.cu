// Products of some hundred rows with weights (out, in) in place, for fp16 and bf16: too many rows
// to keep in registers beside the weights, as linear_stream.cuh does, and too few to fill the GPU
// with tiles of the size that cuBLAS takes. Small tiles, K split over a cluster, bias, activation
// and residual behind the sum. A multistage pipeline of asynchronous copies as in CUTLASS' SM80
// kernels.
#include <algorithm>

#include "common/mma.cuh"
#include "cuda/launchers.h"
#include "cuda/linear_params.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kTileRows = 64, kTileColumns = 64, kTileK = 64;
constexpr int kTileThreads = 128;  // 2 x 2 warps of 32 x 32
constexpr int kTileStages = 4;
constexpr int kChunks = kTileK / 8;           // 16-byte chunks of a row of a tile
constexpr int kSumStride = kTileColumns + 4;  // floats: rows start in other banks
constexpr int kStageElements = (kTileRows + kTileColumns) * kTileK;

template <typename T>
constexpr int kTileBytes = kTileStages * kStageElements * int(sizeof(T));
static_assert(kTileRows * kSumStride * 4 <= kTileBytes<__half>, "the sums lie over the stages");

// Where chunk `chunk` of row `row` lies in a tile, in elements: eight rows at the same chunk, which
// one ldmatrix reads, meet no bank twice.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kTileK + (chunk ^ (row & 7)) * 8;
}

__device__ __forceinline__ float4 load_from_rank(const float* local, int rank) {
  float4 value;
#if __CUDA_ARCH__ >= 900
  const uint32_t address = address_in_rank(shared_address(local), rank);
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
#else
  (void)rank;
  value = *reinterpret_cast<const float4*>(local);
#endif
  return value;
}

// Also orders the shared memory of the blocks, which cluster_arrive leaves out.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A cluster owns a tile of 64 rows (blockIdx.y) and 64 columns of one weight, each of its blocks
// `rank_tiles` steps of 64 along K; the partial sums meet in shared memory, where each block adds
// up, in the order of the ranks, and finishes its part of the rows. in_features, out_features and
// strides are multiples of 8, all operands 16-byte aligned. Reads the input once for each column
// tile and the weights once for each row tile, through L2.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    linear_tile_kernel(const LinearParams<T> p, int ranks, int rank_tiles) {
  extern __shared__ __align__(16) unsigned char shared[];
  T* stages = reinterpret_cast<T*>(shared);
  const int rank = blockIdx.x % ranks, tile = blockIdx.x / ranks;
  const int tiles_per_weight = (p.out_features + kTileColumns - 1) / kTileColumns;
  const int which = tile / tiles_per_weight;
  const int first_column = (tile - which * tiles_per_weight) * kTileColumns;
  const int first_row = blockIdx.y * kTileRows;
  const int first_k = rank * rank_tiles * kTileK;
  const int k_tiles = min(rank_tiles, (p.in_features - first_k + kTileK - 1) / kTileK);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;

  // Thread t copies chunk t % 8 of rows t / 8, t / 8 + 16, ... of either tile.
  const int chunk = threadIdx.x % kChunks, copy_row = threadIdx.x / kChunks;
  constexpr int kCopyRows = kTileThreads / kChunks;
  const T* weight = p.weight(which);
  auto copy_weights = [&](int k_tile) {
    T* target = stages + k_tile % kTileStages * kStageElements + kTileRows * kTileK;
    const int k = first_k + k_tile * kTileK + chunk * 8;
#pragma unroll
    for (int i = 0; i < kTileColumns / kCopyRows; ++i) {
      const int row = copy_row + i * kCopyRows, n = first_column + row;
      const bool valid = k < p.in_features && n < p.out_features;
      copy_async_16(target + swizzled(row, chunk),
                    valid ? weight + int64_t(n) * p.in_features + k : weight, valid);
    }
  };
  auto copy_input = [&](int k_tile) {
    T* target = stages + k_tile % kTileStages * kStageElements;
    const int k = first_k + k_tile * kTileK + chunk * 8;
#pragma unroll
    for (int i = 0; i < kTileRows / kCopyRows; ++i) {
      const int row = copy_row + i * kCopyRows, m = first_row + row;
      const bool valid = k < p.in_features && m < p.rows;
      copy_async_16(target + swizzled(row, chunk),
                    valid ? p.input + m * p.input_stride + k : p.input, valid);
    }
  };

  for (int i = 0; i < kTileStages - 1 && i < k_tiles; ++i) copy_weights(i);
  release_dependents();
  wait_for_predecessor();
  for (int i = 0; i < kTileStages - 1; ++i) {
    if (i < k_tiles) copy_input(i);
    copy_async_commit();  // the first group holds all the weights copied so far
  }

  float sums[2][4][4] = {};
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    copy_async_wait<kTileStages - 2>();
    __syncthreads();  // this stage is here, and the one to be filled has been read
    const int ahead = k_tile + kTileStages - 1;
    if (ahead < k_tiles) {
      copy_weights(ahead);
      copy_input(ahead);
    }
    copy_async_commit();
    const T* input = stages + k_tile % kTileStages * kStageElements;
    const T* weights = input + kTileRows * kTileK;
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ldmatrix_x4(a[i], input + swizzled(warp_row + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 2; ++j)
        ldmatrix_x4(b[j], weights + swizzled(warp_column + j * 16 + lane / 16 * 8 + lane % 8,
                                             step * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mma_m16n8k16<T>(sums[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[j / 2][j % 2 * 2],
                          b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  copy_async_wait<0>();
  __syncthreads();  // nobody reads or fills the stages any more
  float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float* target = partial + (warp_row + i * 16 + lane / 4) * kSumStride + warp_column + j * 8 +
                      lane % 4 * 2;
      *reinterpret_cast<float2*>(target) = make_float2(sums[i][j][0], sums[i][j][1]);
      *reinterpret_cast<float2*>(target + 8 * kSumStride) =
          make_float2(sums[i][j][2], sums[i][j][3]);
    }
  }
  if (ranks > 1) {
    cluster_barrier();
  } else {
    __syncthreads();
  }

  const int rank_rows = kTileRows / ranks;
  for (int i = threadIdx.x; i < rank_rows * (kTileColumns / 8); i += kTileThreads) {
    const int row = rank * rank_rows + i / (kTileColumns / 8), column = i % (kTileColumns / 8) * 8;
    const int m = first_row + row, n = first_column + column;
    if (m >= p.rows || n >= p.out_features) continue;
    float values[8] = {};
    for (int from = 0; from < ranks; ++from) {
      const float* source = partial + row * kSumStride + column;
      const float4 low = load_from_rank(source, from), high = load_from_rank(source + 4, from);
      values[0] += low.x, values[1] += low.y, values[2] += low.z, values[3] += low.w;
      values[4] += high.x, values[5] += high.y, values[6] += high.z, values[7] += high.w;
    }
    float terms[8];
    if (p.bias(which) != nullptr) {
      load_vector(p.bias(which) + n, terms);
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] += terms[e];
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) values[e] = activate_fast(values[e], p.activation);
    const int64_t at = m * p.out_stride + int64_t(which) * p.out_features + n;
    if (p.residual != nullptr) {
      load_vector(p.residual + at, terms);
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] += terms[e];
    }
    store_vector(p.out + at, values);
  }
  if (ranks > 1) cluster_barrier();  // the others may still read this block's sums
}

}  // namespace

bool takes_linear_tile(const LinearArgs& args) {
  constexpr int64_t kVector = 8;
  if (args.dtype == DType::kFloat32 || args.in_out || args.norm_weight != nullptr) return false;
  if (args.rows > kMaxTiledRows || kernel_capability() < 8) return false;
  bool aligned = is_aligned(args.input) && is_aligned(args.out) && is_aligned(args.residual);
  for (int i = 0; i < args.num_weights; ++i)
    aligned = aligned && is_aligned(args.weight[i]) && is_aligned(args.bias[i]);
  return aligned && args.in_features > 0 && args.in_features % kVector == 0 &&
         args.out_features % kVector == 0 && args.input_stride % kVector == 0 &&
         args.out_stride % kVector == 0;
}

template <typename T>
cudaError_t launch_linear_tile(const LinearArgs& args, cudaStream_t stream, bool chained) {
  LinearParams<T> p = {};
  p.out = static_cast<T*>(args.out);
  p.input = static_cast<const T*>(args.input);
  p.weight0 = static_cast<const T*>(args.weight[0]);
  p.weight1 = static_cast<const T*>(args.weight[1]);
  p.weight2 = static_cast<const T*>(args.weight[2]);
  p.bias0 = static_cast<const T*>(args.bias[0]);
  p.bias1 = static_cast<const T*>(args.bias[1]);
  p.bias2 = static_cast<const T*>(args.bias[2]);
  p.residual = static_cast<const T*>(args.residual);
  p.input_stride = args.input_stride;
  p.out_stride = args.out_stride;
  p.rows = static_cast<int>(args.rows);
  p.in_features = static_cast<int>(args.in_features);
  p.out_features = static_cast<int>(args.out_features);
  p.num_weights = args.num_weights;
  p.activation = args.activation;

  const int64_t tiles = ceil_div(args.out_features, kTileColumns) * args.num_weights;
  const int64_t row_tiles = ceil_div(args.rows, kTileRows);
  const int64_t k_tiles = ceil_div(args.in_features, kTileK);
  // A second block on a multiprocessor costs less than a longer walk along K.
  const int64_t blocks = device_attribute(cudaDevAttrMultiProcessorCount) * 5 / 4;
  int64_t ranks = 1;
  while (kernel_capability() >= 9 && ranks < kMaxClusterSize &&
         2 * ranks * tiles * row_tiles <= blocks && k_tiles >= 4 * ranks)
    ranks *= 2;
  const int64_t rank_tiles = ceil_div(k_tiles, ranks);
  while (ranks > 1 && (ranks - 1) * rank_tiles >= k_tiles) ranks /= 2;

  LaunchConfig config;
  config.stream = stream;
  config.chained = chained;
  config.grid = dim3(static_cast<unsigned>(tiles * ranks), static_cast<unsigned>(row_tiles));
  config.block = dim3(kTileThreads);
  config.cluster_size = static_cast<int>(ranks);
  config.shared_bytes = kTileBytes<T>;
  return launch(config, linear_tile_kernel<T>, p, static_cast<int>(ranks),
                static_cast<int>(ceil_div(k_tiles, ranks)));
}

template <>
cudaError_t launch_linear_tile<float>(const LinearArgs&, cudaStream_t, bool) {
  return cudaErrorInvalidValue;
}
template cudaError_t launch_linear_tile<__half>(const LinearArgs&, cudaStream_t, bool);
template cudaError_t launch_linear_tile<__nv_bfloat16>(const LinearArgs&, cudaStream_t, bool);

}  // namespace eet_patch::cuda
