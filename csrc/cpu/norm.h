// Row primitives of layer norm: statistics in two passes (mean, then the variance about it), both
// in fp32.
#pragma once

#include "cpu/math.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

struct RowStatistics {
  float mean, inverse_std;
};

// Four accumulators hide the latency of the additions and shorten the chains of roundings.
template <typename T>
inline RowStatistics row_statistics(const T* row, int64_t size, float eps) {
  constexpr int64_t kStep = 4 * kLanes;
  Vec sum[4] = {zero(), zero(), zero(), zero()};
  int64_t j = 0;
  for (; j + kStep <= size; j += kStep) {
    for (int u = 0; u < 4; ++u) sum[u] = sum[u] + load(row + j + u * kLanes);
  }
  for (; j < size; j += kLanes) sum[0] = sum[0] + load_upto(row + j, size - j);
  const float mean = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) / float(size);

  const Vec centre = set1(mean);
  Vec square[4] = {zero(), zero(), zero(), zero()};
  for (j = 0; j + kStep <= size; j += kStep) {
    for (int u = 0; u < 4; ++u) {
      const Vec d = load(row + j + u * kLanes) - centre;
      square[u] = fma(d, d, square[u]);
    }
  }
  for (; j < size; j += kLanes) {
    const Vec d = select_first(load_upto(row + j, size - j) - centre, size - j, zero());
    square[0] = fma(d, d, square[0]);
  }
  const float variance =
      reduce_add((square[0] + square[1]) + (square[2] + square[3])) / float(size);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

// Lanes [j, j + n) of the normalised row; weight and bias may be null.
template <typename T>
EET_INLINE Vec normalise(Vec x, const RowStatistics& statistics, const T* weight, const T* bias,
                         int64_t j, int64_t n) {
  Vec y = (x - set1(statistics.mean)) * set1(statistics.inverse_std);
  if (weight != nullptr) y = y * load_upto(weight + j, n);
  if (bias != nullptr) y = y + load_upto(bias + j, n);
  return y;
}

// out may be the row itself when the types agree.
template <typename In, typename T>
inline void layernorm_row(T* out, const In* row, const T* weight, const T* bias, int64_t size,
                          float eps) {
  const RowStatistics statistics = row_statistics(row, size, eps);
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    store(out + j, normalise(load(row + j), statistics, weight, bias, j, kLanes));
  }
  if (j < size) {
    store_partial(out + j,
                  normalise(load_partial(row + j, size - j), statistics, weight, bias, j, size - j),
                  size - j);
  }
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
