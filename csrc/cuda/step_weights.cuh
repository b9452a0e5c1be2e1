// The weights of a decode step's attention, averaged over the heads: what alignments are read from.
// They are formed anew beside the attention, which keeps none.
#pragma once

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace eet_patch::cuda {

constexpr int kWeightsWarps = 8;
constexpr int kWeightsMaxHeadDim = 256;
constexpr int kWeightsSharedBytes = 96 * 1024;

template <typename T>
struct StepWeightsParams {
  const T *query, *key_cache;
  float* weights;
  const int32_t *lengths, *kv_start, *cache_rows, *weight_rows, *weight_positions;
  int64_t query_stride, weight_row_stride, weight_position_stride;
  HeadStrides strides;
  int num_heads, head_dim, num_weights;
  float scale;
};

// One block per row. A warp owns a head at a time, a lane every 32nd key of it; scores of a head
// and the sum over the heads lie in dynamic shared memory, (warps + 1) * num_weights floats. The
// heads are added in their order. Reads K once. kVector > 1 needs 16-byte aligned rows.
template <typename T, int kVector>
__global__ void __launch_bounds__(kWeightsWarps* kWarpSize)
    step_weights_kernel(const StepWeightsParams<T> p) {
  extern __shared__ float scores[];
  __shared__ float queries[kWeightsWarps][kWeightsMaxHeadDim];
  release_dependents();
  const int row = blockIdx.x, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warps = blockDim.x / kWarpSize, threads = blockDim.x;
  const int end = min(p.lengths[row], p.num_weights);
  const int begin = p.kv_start != nullptr ? max(0, min(p.kv_start[row], end)) : 0;
  const int64_t cache_row = p.cache_rows != nullptr ? p.cache_rows[row] : row;
  float* sums = scores + warps * p.num_weights;
  float* own = scores + warp * p.num_weights;
  for (int key = threadIdx.x; key < p.num_weights; key += threads) sums[key] = 0.0f;
  wait_for_predecessor();

  for (int first = 0; first < p.num_heads; first += warps) {
    const int head = first + warp;
    if (head < p.num_heads) {
      const T* query = p.query + row * p.query_stride + int64_t(head) * p.head_dim;
      for (int d = lane; d < p.head_dim; d += kWarpSize)
        queries[warp][d] = to_float(query[d]) * p.scale;
      __syncwarp();
      const T* keys = p.key_cache + cache_row * p.strides.batch + head * p.strides.head;
      float highest = -INFINITY;
      for (int key = begin + lane; key < end; key += kWarpSize) {
        float score = 0.0f;
        for (int d = 0; d < p.head_dim; d += kVector) {
          float values[kVector];
          load_vector(keys + key * p.strides.token + d, values);
#pragma unroll
          for (int i = 0; i < kVector; ++i) score = fmaf(queries[warp][d + i], values[i], score);
        }
        own[key] = score;
        highest = fmaxf(highest, score);
      }
      highest = warp_max(highest);
      float sum = 0.0f;
      for (int key = begin + lane; key < end; key += kWarpSize) {
        own[key] = expf(own[key] - highest);
        sum += own[key];
      }
      const float share = 1.0f / (warp_sum(sum) * p.num_heads);
      for (int key = begin + lane; key < end; key += kWarpSize) own[key] *= share;
    }
    __syncthreads();
    const int heads = min(warps, p.num_heads - first);
    for (int key = begin + static_cast<int>(threadIdx.x); key < end; key += threads) {
      float sum = sums[key];
      for (int w = 0; w < heads; ++w) sum += scores[w * p.num_weights + key];
      sums[key] = sum;
    }
    __syncthreads();
  }
  const int64_t target_row = p.weight_rows != nullptr ? p.weight_rows[row] : row;
  const int64_t position = p.weight_positions != nullptr ? p.weight_positions[row] : 0;
  float* target =
      p.weights + target_row * p.weight_row_stride + position * p.weight_position_stride;
  for (int key = threadIdx.x; key < p.num_weights; key += threads) target[key] = sums[key];
}

template <typename T>
cudaError_t launch_step_weights(const StepAttentionArgs& args, bool vectors, cudaStream_t stream,
                                bool chained) {
  StepWeightsParams<T> p = {};
  p.query = static_cast<const T*>(args.query);
  p.key_cache = static_cast<const T*>(args.key_cache);
  p.weights = args.weights;
  p.lengths = args.lengths;
  p.kv_start = args.kv_start;
  p.cache_rows = args.cache_rows;
  p.weight_rows = args.weight_rows;
  p.weight_positions = args.weight_positions;
  p.query_stride = args.query_stride;
  p.weight_row_stride = args.weight_row_stride;
  p.weight_position_stride = args.weight_position_stride;
  p.strides = args.cache_strides;
  p.num_heads = static_cast<int>(args.num_heads);
  p.head_dim = static_cast<int>(args.head_dim);
  p.num_weights = static_cast<int>(args.num_weights);
  p.scale = args.softmax_scale;
  const int64_t row_bytes = args.num_weights * int64_t(sizeof(float));
  const int64_t fitting = kWeightsSharedBytes / (row_bytes > 0 ? row_bytes : 1) - 1;
  if (fitting < 1) return cudaErrorInvalidConfiguration;
  const int warps = static_cast<int>(fitting < kWeightsWarps ? fitting : kWeightsWarps);
  LaunchConfig config;
  config.stream = stream;
  config.chained = chained;
  config.grid = dim3(static_cast<unsigned>(args.rows));
  config.block = dim3(static_cast<unsigned>(warps * kWarpSize));
  config.shared_bytes = static_cast<size_t>((warps + 1) * row_bytes);
  return vectors ? launch(config, step_weights_kernel<T, kVectorSize<T>>, p)
                 : launch(config, step_weights_kernel<T, 1>, p);
}

}  // namespace eet_patch::cuda
