// Layer norm of one row by a group of threads, whatever the row is made of. Ba et al. 2016,
// arXiv:1607.06450.
#pragma once

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace eet_patch::cuda {

// The first kHeldChunks * kThreads * kVector elements of a row stay in registers between the
// passes; what is beyond them is loaded again (from L1 or L2).
constexpr int kHeldChunks = 4;

// The block's 32 * kWarps threads own the row when kWarps > 1; else each warp owns one.
// load(column, values) yields kVector elements of the row as floats, and store(column, values,
// normalised) takes them and what becomes of them (before weight and bias), once nobody will load
// that column again; columns are multiples of kVector below `size`, which kVector divides. Mean
// first, then the variance about it.
template <int kWarps, int kVector, typename Load, typename Store>
__device__ __forceinline__ void normalise_row(int size, float eps, float* shared, Load load,
                                              Store store) {
  constexpr int kStride = kWarps * kWarpSize * kVector;
  const int first = (kWarps > 1 ? threadIdx.x : threadIdx.x % kWarpSize) * kVector;
  float held[kHeldChunks][kVector];
  float sum = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < kHeldChunks; ++chunk) {
    const int column = first + chunk * kStride;
    if (column < size) {
      load(column, held[chunk]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += held[chunk][i];
    }
  }
  const int rest = first + kHeldChunks * kStride;
  float values[kVector];
  for (int column = rest; column < size; column += kStride) {
    load(column, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += values[i];
  }
  const float mean = block_sum<kWarps>(sum, shared) / size;

  float squares = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < kHeldChunks; ++chunk) {
    if (first + chunk * kStride < size) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        squares += (held[chunk][i] - mean) * (held[chunk][i] - mean);
    }
  }
  for (int column = rest; column < size; column += kStride) {
    load(column, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += (values[i] - mean) * (values[i] - mean);
  }
  const float scale = rsqrtf(block_sum<kWarps>(squares, shared) / size + eps);

#pragma unroll
  for (int chunk = 0; chunk < kHeldChunks; ++chunk) {
    const int column = first + chunk * kStride;
    if (column < size) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = (held[chunk][i] - mean) * scale;
      store(column, held[chunk], values);
    }
  }
  for (int column = rest; column < size; column += kStride) {
    load(column, held[0]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = (held[0][i] - mean) * scale;
    store(column, held[0], values);
  }
}

// values = values * weight + bias at `column`; both may be null.
template <int kVector, typename T>
__device__ __forceinline__ void scale_and_shift(float (&values)[kVector], const T* weight,
                                                const T* bias, int column) {
  float other[kVector];
  if (weight != nullptr) {
    load_vector(weight + column, other);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= other[i];
  }
  if (bias != nullptr) {
    load_vector(bias + column, other);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] += other[i];
  }
}

}  // namespace eet_patch::cuda
