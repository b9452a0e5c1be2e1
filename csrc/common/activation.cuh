// The activation functions, in float.
#pragma once

#include "common/types.h"

namespace eet_patch::cuda {

__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kGeluErf:
      return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;  // keeps NaN
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    default:
      return x;
  }
}

// The same in few instructions, right to about 1e-6: for results that are rounded to 16 bits.
__device__ __forceinline__ float activate_fast(float x, Activation activation) {
  constexpr float kLog2e = 1.4426950408889634f;
  float exponent;
  if (activation == Activation::kGeluErf) {
    // Abramowitz and Stegun, 7.1.26: erfc of |x| / sqrt(2) to 1.5e-7.
    const float z = fabsf(x) * 0.7071067811865476f;
    const float t = __fdividef(1.0f, fmaf(0.3275911f, z, 1.0f));
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-kLog2e * z * z));
    float tail = fmaf(1.061405429f, t, -1.453152027f);
    tail = fmaf(tail, t, 1.421413741f);
    tail = fmaf(tail, t, -0.284496736f);
    tail = fmaf(tail, t, 0.254829592f);
    tail = 0.5f * tail * t * power;
    return x * (x < 0.0f ? tail : 1.0f - tail);  // of -inf NaN, as the product with erf's 0
  }
  if (activation == Activation::kGeluTanh) {  // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u))
    exponent = -2.0f * kLog2e * 0.7978845608028654f * fmaf(0.044715f * x * x, x, x);
  } else if (activation == Activation::kSilu) {
    exponent = -kLog2e * x;
  } else {
    return activate(x, activation);
  }
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power > 1e30f ? -0.0f : __fdividef(x, 1.0f + power);
}

}  // namespace eet_patch::cuda
