// What the linear kernels share: their argument, the side-by-side weights, the fused layer norm
// and the epilogue.
#pragma once

#include "common/activation.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace eet_patch::cuda {

constexpr int kNormTile = 64;  // columns of a row that one pair of partial statistics stands for

template <typename T>
struct LinearParams {
  T* out;
  const T* input;
  const T *weight0, *weight1, *weight2;
  const T *bias0, *bias1, *bias2;
  const T* residual;  // may be out
  const T *norm_weight, *norm_bias;
  const float2* norm_partials;  // of the input; null: the statistics are taken from the input
  // Layer norm of the residual, whose statistics come from residual_partials; or null. Not beside
  // one of the input.
  const T *residual_norm_weight, *residual_norm_bias;
  const float2* residual_partials;
  float2* out_partials;  // (rows, ceil(out_features / kNormTile)) mean, sum of squares about it
  int64_t input_stride, out_stride;
  int rows, in_features, out_features, num_weights;
  float norm_eps;
  Activation activation;
  bool pairs;         // two neighbours of bias, residual and out may be one access
  bool release_late;  // the next launch starts only after the one before this has ended

  __host__ __device__ __forceinline__ const T* weight(int i) const {
    return i == 0 ? weight0 : i == 1 ? weight1 : weight2;
  }
  __host__ __device__ __forceinline__ const T* bias(int i) const {
    return i == 0 ? bias0 : i == 1 ? bias1 : bias2;
  }
};

// out[row][column of weight `which`] from the finished sum: bias, activation, residual, in that
// order and in float.
template <typename T>
__device__ __forceinline__ void finish_element(const LinearParams<T>& p, int row, int which,
                                               int column, float sum) {
  const T* bias = p.bias(which);
  if (bias != nullptr) sum += to_float(bias[column]);
  sum = activate(sum, p.activation);
  const int64_t at = row * p.out_stride + int64_t(which) * p.out_features + column;
  if (p.residual != nullptr) sum += to_float(p.residual[at]);
  p.out[at] = from_float<T>(sum);
}

// Mean and 1 / sqrt(variance + eps) of every input row, a warp a row, by the first `warps` of the
// block. kVector > 1 needs 16-byte aligned rows.
template <typename T, int kVector>
__device__ __forceinline__ void row_statistics(const LinearParams<T>& p, float* means,
                                               float* scales, int warps) {
  const int lane = threadIdx.x % kWarpSize;
  for (int row = threadIdx.x / kWarpSize; row < p.rows; row += warps) {
    const T* input = p.input + row * p.input_stride;
    float values[kVector];
    float sum = 0.0f;
#pragma unroll 4
    for (int k = lane * kVector; k < p.in_features; k += kWarpSize * kVector) {
      load_vector(input + k, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += values[i];
    }
    const float mean = warp_sum(sum) / p.in_features;
    float squares = 0.0f;
#pragma unroll 4
    for (int k = lane * kVector; k < p.in_features; k += kWarpSize * kVector) {
      load_vector(input + k, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares += (values[i] - mean) * (values[i] - mean);
    }
    squares = warp_sum(squares) / p.in_features;
    if (lane == 0) {
      means[row] = mean;
      scales[row] = rsqrtf(squares + p.norm_eps);
    }
  }
}

// values = (values - mean) * scale * norm_weight + norm_bias at column k.
template <typename T, int kVector>
__device__ __forceinline__ void apply_norm(const LinearParams<T>& p, float (&values)[kVector],
                                           int k, float mean, float scale) {
  float other[kVector];
  load_vector(p.norm_weight + k, other);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = (values[i] - mean) * scale * other[i];
  if (p.norm_bias != nullptr) {
    load_vector(p.norm_bias + k, other);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] += other[i];
  }
}

}  // namespace eet_patch::cuda
