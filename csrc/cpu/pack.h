// Packing of operands into the layouts that the register tile reads, with conversion to fp32.
#pragma once

#include "cpu/norm.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

// One row of A into its chunks (see microkernel.h), zeros up to the next whole chunk, scaled.
template <typename T>
inline void pack_row(float* dst, int64_t chunk_stride, const T* row, int64_t size, float scale) {
  const Vec factor = set1(scale);
  for (int64_t j = 0; j < size; j += kLanes, dst += chunk_stride)
    store(dst, load_upto(row + j, size - j) * factor);
}

// The same with layer norm in between.
template <typename T>
inline void pack_row_normalised(float* dst, int64_t chunk_stride, const T* row, int64_t size,
                                const T* weight, const T* bias, float eps) {
  const RowStatistics statistics = row_statistics(row, size, eps);
  for (int64_t j = 0; j < size; j += kLanes, dst += chunk_stride) {
    const int64_t n = size - j;
    store(dst, select_first(normalise(load_upto(row + j, n), statistics, weight, bias, j, n), n,
                            zero()));
  }
}

// A panel of B from rows that are its columns: dst[k * ld + j] = src[j * stride + k] for j <
// columns, k < depth; zeros in columns up to the next whole vector and rows up to the next whole
// chunk. kLanes x kLanes blocks, transposed in registers.
template <typename T>
inline void pack_transposed(float* dst, int64_t ld, const T* src, int64_t stride, int64_t columns,
                            int64_t depth) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const T* block = src + j * stride;
    float* out = dst + j;
    int64_t k = 0;
    if (columns - j >= kLanes) {
      for (; k + kLanes <= depth; k += kLanes) {
        Vec r[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          r[i] = load(block + i * stride + k);
          __builtin_prefetch(block + (kLanes + i) * stride + k);
        }
        transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + (k + i) * ld, r[i]);
      }
    }
    for (; k < depth; k += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        r[i] = j + i < columns ? load_upto(block + i * stride + k, depth - k) : zero();
      }
      transpose(r);
      for (int i = 0; i < kLanes; ++i) store(out + (k + i) * ld, r[i]);
    }
  }
}

// A panel of B from its rows: dst[k * ld + j] = src[k * stride + j], zeros as above.
template <typename T>
inline void pack_straight(float* dst, int64_t ld, const T* src, int64_t stride, int64_t columns,
                          int64_t depth, int64_t padded_depth) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = 0; j < columns; j += kLanes)
      store(dst + k * ld + j, load_upto(src + k * stride + j, columns - j));
  }
  for (int64_t k = depth; k < padded_depth; ++k) {
    for (int64_t j = 0; j < columns; j += kLanes) store(dst + k * ld + j, zero());
  }
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
