// Which keys a query sees, and what is added to their scores: the one copy for prefill and
// decoding.
#pragma once

#include <cmath>

#include "common/convert.cuh"
#include "common/types.h"

namespace eet_patch::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// 2 to the power x by the special function unit (2 ulp; results below the least normal number
// become 0).
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The mask's term for one score, in units of log2 (so that exp2 serves): 0, the entry, or -inf to
// exclude the key.
template <typename T>
__device__ __forceinline__ float mask_term(const AttentionMask& mask, int64_t offset) {
  switch (mask.kind) {
    case MaskKind::kBoolKeep:
      return static_cast<const bool*>(mask.data)[offset] ? 0.0f : -INFINITY;
    case MaskKind::kBoolDrop:
      return static_cast<const bool*>(mask.data)[offset] ? -INFINITY : 0.0f;
    case MaskKind::kAddFloat32: {
      const float entry = static_cast<const float*>(mask.data)[offset];
      return entry <= lowest_finite<float>() ? -INFINITY : entry * kLog2E;
    }
    case MaskKind::kAddElement: {
      const float entry = to_float(static_cast<const T*>(mask.data)[offset]);
      return entry <= lowest_finite<T>() ? -INFINITY : entry * kLog2E;
    }
    case MaskKind::kIntKeep: {
      const int64_t entry = static_cast<const int64_t*>(mask.data)[offset];
      return entry == 1 ? 0.0f : entry == 0 ? -INFINITY : NAN;
    }
    default:
      return 0.0f;
  }
}

}  // namespace eet_patch::cuda
