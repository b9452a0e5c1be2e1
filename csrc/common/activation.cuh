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

}  // namespace eet_patch::cuda
