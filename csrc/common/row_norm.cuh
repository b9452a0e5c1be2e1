// Layer norm of one row by a group of threads, whatever the row is made of. Ba et al. 2016,
// arXiv:1607.06450.
#pragma once

#include <type_traits>

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

// An aligned row in the registers of a warp: lane l holds 16-byte vectors l, l + 32, ... of it, and
// zeros beyond its end. Asked for whole, so that all its loads are under way at once.
template <typename T, int kChunks>
struct HeldRow {
  static constexpr int kVector = kVectorSize<T>;
  static constexpr int kStride = kWarpSize * kVector;
  using Values = float[kChunks][kVector];
  uint4 vectors[kChunks];

  static __device__ __forceinline__ int first() { return threadIdx.x % kWarpSize * kVector; }

  // `source` may be null: zeros.
  __device__ __forceinline__ void load(const T* source, int size) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = first() + c * kStride;
      vectors[c] = source != nullptr && column < size
                       ? *reinterpret_cast<const uint4*>(source + column)
                       : uint4{};
    }
  }

  __device__ __forceinline__ void add_to(Values& values) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float added[kVector];
      unpack_vector<T>(vectors[c], added);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[c][i] += added[i];
    }
  }
};

// The layer norm of `values`, zeros beyond `size`, to `out`.
template <typename T, int kChunks>
__device__ __forceinline__ void normalise_held(typename HeldRow<T, kChunks>::Values& values,
                                               int size, float eps, bool has_weight,
                                               const HeldRow<T, kChunks>& weight,
                                               const HeldRow<T, kChunks>& bias, T* out) {
  constexpr int kVector = kVectorSize<T>, kStride = HeldRow<T, kChunks>::kStride;
  const int first = HeldRow<T, kChunks>::first();
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += values[c][i];
  }
  const float mean = warp_sum(sum) / size;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (first + c * kStride >= size) break;
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += (values[c][i] - mean) * (values[c][i] - mean);
  }
  const float scale = rsqrtf(warp_sum(squares) / size + eps);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int column = first + c * kStride;
    if (column >= size) break;
    float other[kVector];
    unpack_vector<T>(weight.vectors[c], other);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      values[c][i] = (values[c][i] - mean) * scale * (has_weight ? other[i] : 1.0f);
    unpack_vector<T>(bias.vectors[c], other);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[c][i] += other[i];
    store_vector(out + column, values[c]);
  }
}

// function(std::integral_constant<int, kChunks>()) with enough vectors a lane for rows of up to
// 1024 elements.
template <typename T, typename Function>
auto with_held_chunks(int64_t size, Function&& function) {
  constexpr int kMost = 1024 / HeldRow<T, 1>::kStride;  // 4, or 8 of float
  if (size * 2 <= 1024) return function(std::integral_constant<int, kMost / 2>());
  if (size * 4 <= 3 * 1024) return function(std::integral_constant<int, kMost / 4 * 3>());
  return function(std::integral_constant<int, kMost>());
}

}  // namespace eet_patch::cuda
