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
    // Abramowitz and Stegun, 7.1.26: erfc of |x| / sqrt(2) to 1.5e-7, here halved: x's tail.
    const float size = fabsf(x);
    float t, power;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(fmaf(0.3275911f * 0.70710678f, size, 1.0f)));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-0.5f * kLog2e * x * x));
    float tail = fmaf(0.5f * 1.061405429f, t, 0.5f * -1.453152027f);
    tail = fmaf(tail, t, 0.5f * 1.421413741f);
    tail = fmaf(tail, t, 0.5f * -0.284496736f);
    tail = fmaf(tail, t, 0.5f * 0.254829592f) * t * power;
    // The tail is 0 from 14 on: of infinities a product with it would be NaN.
    return fmaf(-fminf(size, 100.0f), tail, fmaxf(x, 0.0f));
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
