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

// GELU of kCount values whose chains of instructions interleave. The logarithm of the odds of
// Phi(x), to base 2, is nearly x times a polynomial of x^2: fitted here to the least largest error
// of x * Phi(x), which is 6e-7 (in float, over all x), and positive where x is large, so that the
// limits are right.
template <int kCount>
__device__ __forceinline__ void gelu_fast(float (&x)[kCount]) {
  constexpr float kOdds[] = {-2.3022072036246164f,    -0.10483858113919114f,
                             9.559284439962901e-05f,  1.5938943901922587e-04f,
                             -1.145243367248641e-05f, 3.850452297687848e-07f,
                             -5.209914016082803e-09f};
  constexpr int kLast = sizeof(kOdds) / sizeof(kOdds[0]) - 1;
  float odds[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) odds[i] = kOdds[kLast];
#pragma unroll
  for (int k = kLast - 1; k >= 0; --k) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) odds[i] = fmaf(odds[i], x[i] * x[i], kOdds[k]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(odds[i]) : "f"(odds[i] * x[i]));
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(odds[i]) : "f"(1.0f + odds[i]));
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= odds[i];  // of -inf NaN, as the product with erf's 0
}

// The same in few instructions, right to about 1e-6: for results that are rounded to 16 bits.
__device__ __forceinline__ float activate_fast(float x, Activation activation) {
  constexpr float kLog2e = 1.4426950408889634f;
  float exponent;
  if (activation == Activation::kGeluErf) {
    float value[1] = {x};
    gelu_fast(value);
    return value[0];
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

// Out of line, for activations that are rare where they would make most of a kernel's code, which
// has to be fetched; a call takes longer than the instructions of one.
inline __device__ __noinline__ float activate_out_of_line(float x, Activation activation) {
  return activate_fast(x, activation);
}

}  // namespace eet_patch::cuda
