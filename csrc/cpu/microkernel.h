// The register tile of every matrix product: R rows of A times NV vectors of columns of B, fp32.
//
// A lies in chunks of kLanes columns: chunk c of row i at a[c * a_chunk_stride + i * kLanes], so
// that packing it copies whole vectors and the kernel's broadcasts have constant offsets. B has one
// row of NV vectors every ldb floats. The tile is R * NV accumulators: with AVX-512 14 x 2 of 32
// registers, else 6 x 2 of 16.
#pragma once

#include "cpu/simd.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;
constexpr int64_t kTileColumns = kTileVectors * kLanes;

// c[i * ldc + column] = (accumulate ? c : 0) + sum over chunks * kLanes terms
template <int R, int NV>
void micro_kernel(const float* __restrict__ a, int64_t a_chunk_stride, const float* __restrict__ b,
                  int64_t ldb, int64_t chunks, float* __restrict__ c, int64_t ldc,
                  bool accumulate) {
  Vec acc[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = accumulate ? load(c + i * ldc + v * kLanes) : zero();
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
#pragma GCC unroll 4
    for (int k = 0; k < kLanes; ++k) {
      Vec column[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Vec row = set1(a[i * kLanes + k]);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[i][v] = fma(row, column[v], acc[i][v]);
      }
      b += ldb;
    }
    a += a_chunk_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(c + i * ldc + v * kLanes, acc[i][v]);
  }
}

using MicroKernel = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t,
                             bool);

// The kernel for `rows` (1 .. kTileRows) rows and 1 or 2 vectors of columns.
template <int NV>
inline MicroKernel micro_kernel_for(int64_t rows) {
  static constexpr MicroKernel kKernels[] = {
      micro_kernel<1, NV>,  micro_kernel<2, NV>,  micro_kernel<3, NV>,  micro_kernel<4, NV>,
      micro_kernel<5, NV>,  micro_kernel<6, NV>,
#if defined(__AVX512F__)
      micro_kernel<7, NV>,  micro_kernel<8, NV>,  micro_kernel<9, NV>,  micro_kernel<10, NV>,
      micro_kernel<11, NV>, micro_kernel<12, NV>, micro_kernel<13, NV>, micro_kernel<14, NV>,
#endif
  };
  return kKernels[rows - 1];
}

// Columns [0, columns) of the tile, columns <= kTileColumns.
inline MicroKernel micro_kernel_for(int64_t rows, int64_t columns) {
  return columns > kLanes ? micro_kernel_for<2>(rows) : micro_kernel_for<1>(rows);
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
