// exp, erf and the activations on one vector of floats.
#pragma once

#include "cpu/simd.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

// exp within 2 ulp for x <= 88.3 (above: the value there, about 2e38); exactly 0 below -87.3, so
// also at -inf. x = n ln2 + r with ln2 in two parts, exp(r) by a polynomial on |r| <= ln2 / 2
// (Cephes expf), then times 2^n.
EET_INLINE Vec exp(Vec x) {
  const Vec lowest = set1(-87.3f);
  const Vec clamped =
      min(set1(88.3f), max(lowest, x));  // min and max give the second operand for NaN
  const Vec n = round_nearest(clamped * set1(1.44269504088896341f));
  Vec r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  return select_less(x, lowest, zero(), scale_by_power(p, n));
}

// 1 - erf(z) for z >= 0, relative error below 2e-7 up to z = 9: exp(-z^2) t P(t) with t = 1 / (1 +
// z / 2). P is a least squares fit reweighted towards the minimax error, 4e-8. A form whose error
// is relative keeps the tail of gelu, where 1 + erf(x) cancels.
EET_INLINE Vec erfc(Vec z) {
  const Vec t = set1(1.0f) / fma(z, set1(0.5f), set1(1.0f));
  Vec p = fma(t, set1(-5.888852325e-02f), set1(2.836918712e-01f));
  p = fma(p, t, set1(-4.853645450e-01f));
  p = fma(p, t, set1(2.759580877e-01f));
  p = fma(p, t, set1(-2.516503323e-02f));
  p = fma(p, t, set1(2.020649314e-01f));
  p = fma(p, t, set1(2.432621452e-01f));
  p = fma(p, t, set1(2.823533399e-01f));
  p = fma(p, t, set1(2.820876840e-01f));
  return exp(zero() - z * z) * (t * p);
}

// x / (1 + exp(-y)): silu for y = x, the tanh form of gelu for y = 2 sqrt(2/pi) (x + 0.044715 x^3),
// without cancellation
EET_INLINE Vec gate(Vec x, Vec y) {
  const Vec power = zero() - y;
  // exp ends at 88.3, and a huge x over its value there would not be 0.
  const Vec e = select_less(set1(88.0f), power, set1(__builtin_inff()), exp(power));
  return x / (set1(1.0f) + e);
}

template <Activation kActivation>
EET_INLINE Vec activate(Vec x) {
  if (kActivation == Activation::kGeluErf) {
    // x Phi(x), from the tail: half x erfc(|x| / sqrt 2) below 0, x less that above.
    const Vec near = min(set1(30.0f), max(set1(-30.0f), x));  // keeps NaN; infinity times 0 is NaN
    const Vec size = max(near, zero() - near);
    const Vec tail = set1(0.5f) * near * erfc(size * set1(0.70710678118654752f));
    return select_less(zero(), x, x - tail, tail);
  }
  if (kActivation == Activation::kGeluTanh) {
    const Vec y =
        x * fma(x * x, set1(2 * 0.79788456080286536f * 0.044715f), set1(2 * 0.79788456080286536f));
    return gate(x, y);
  }
  if (kActivation == Activation::kRelu) return select_less(x, zero(), zero(), x);  // keeps NaN
  if (kActivation == Activation::kSilu) return gate(x, x);
  return x;
}

template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation kValue = kActivation;
};

// Calls body(ActivationTag<...>()) so that the choice is made outside the loops.
template <typename Body>
EET_INLINE void for_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kGeluErf:
      return body(ActivationTag<Activation::kGeluErf>());
    case Activation::kGeluTanh:
      return body(ActivationTag<Activation::kGeluTanh>());
    case Activation::kRelu:
      return body(ActivationTag<Activation::kRelu>());
    case Activation::kSilu:
      return body(ActivationTag<Activation::kSilu>());
    case Activation::kNone:
      break;
  }
  body(ActivationTag<Activation::kNone>());
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
