// Masks of every kind as a row of fp32 terms: what is added to the scores of consecutive keys, -inf
// where excluded.
#pragma once

#include <cfloat>

#include "cpu/simd.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

template <typename T>
constexpr float lowest_finite() {
  return -FLT_MAX;
}
template <>
constexpr float lowest_finite<Half>() {
  return -65504.0f;
}
template <>
constexpr float lowest_finite<BFloat16>() {
  return -0x1.fep127f;
}

template <typename E>
inline void additive_terms(float* terms, const E* mask, int64_t stride, int64_t n) {
  const Vec threshold = set1(lowest_finite<E>()), excluded = set1(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes) {
    E gathered[kLanes] = {};
    const E* source = mask + j * stride;
    const int64_t valid = n - j;
    if (stride != 1) {
      for (int64_t i = 0; i < kLanes && i < valid; ++i) gathered[i] = source[i * stride];
      source = gathered;
    }
    const Vec x = load_upto(source, valid);
    store(terms + j, select_less(threshold, x, x, excluded));
  }
}

// terms[0, n) for keys [key, key + n) of one query, up to the next whole vector written. n > 0, the
// mask not kNone.
template <typename T>
inline void mask_terms(float* terms, const AttentionMask& mask, int64_t batch, int64_t head,
                       int64_t query, int64_t key, int64_t n) {
  const int64_t offset = batch * mask.batch_stride + head * mask.head_stride +
                         query * mask.query_stride + key * mask.key_stride;
  if (mask.kind == MaskKind::kAddFloat32) {
    additive_terms(terms, static_cast<const float*>(mask.data) + offset, mask.key_stride, n);
  } else if (mask.kind == MaskKind::kAddElement) {
    additive_terms(terms, static_cast<const T*>(mask.data) + offset, mask.key_stride, n);
  } else {
    const uint8_t* source = static_cast<const uint8_t*>(mask.data) + offset;
    const bool keep = mask.kind == MaskKind::kBoolKeep;
    const float if_set = keep ? 0.0f : -kInfinity, if_clear = keep ? -kInfinity : 0.0f;
    if (mask.key_stride == 1) {
      for (int64_t j = 0; j < n; ++j) terms[j] = source[j] != 0 ? if_set : if_clear;
    } else {
      for (int64_t j = 0; j < n; ++j)
        terms[j] = source[j * mask.key_stride] != 0 ? if_set : if_clear;
    }
  }
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
