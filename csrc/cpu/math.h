// exp, erf and the activations on one vector of floats.
#pragma once

#include "cpu/simd.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

// exp within 2 ulp for x <= 88.3 (above: the value there, about 2e38); exactly 0 below -87.3, so also at -inf.
// x = n ln2 + r with ln2 in two parts, exp(r) by a polynomial on |r| <= ln2 / 2 (Cephes expf), then times 2^n.
EET_INLINE Vec exp(Vec x) {
  const Vec lowest = set1(-87.3f);
  const Vec clamped = min(set1(88.3f), max(lowest, x));  // min and max give the second operand for NaN
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

// erf as an odd rational function on [-4, 4], constant beyond; absolute error below 2e-7. Coefficients as in Eigen
// (generic_fast_erf_float, MPL-2.0) and XLA.
EET_INLINE Vec erf(Vec x) {
  x = min(set1(4.0f), max(set1(-4.0f), x));
  const Vec t = x * x;
  Vec p = fma(t, set1(-2.72614225801306e-10f), set1(2.77068142495902e-08f));
  p = fma(p, t, set1(-2.10102402082508e-06f));
  p = fma(p, t, set1(-5.69250639462346e-05f));
  p = fma(p, t, set1(-7.34990630326855e-04f));
  p = fma(p, t, set1(-2.95459980854025e-03f));
  p = fma(p, t, set1(-1.60960333262415e-02f));
  Vec q = fma(t, set1(-1.45660718464996e-05f), set1(-2.13374055278905e-04f));
  q = fma(q, t, set1(-1.68282697438203e-03f));
  q = fma(q, t, set1(-7.37332916720468e-03f));
  q = fma(q, t, set1(-1.42647390514189e-02f));
  return x * p / q;
}

// x / (1 + exp(-y)): silu for y = x, the tanh form of gelu for y = 2 sqrt(2/pi) (x + 0.044715 x^3), without cancellation
EET_INLINE Vec gate(Vec x, Vec y) { return x / (set1(1.0f) + exp(zero() - y)); }

template <Activation kActivation>
EET_INLINE Vec activate(Vec x) {
  if (kActivation == Activation::kGeluErf) {
    return set1(0.5f) * x * (set1(1.0f) + erf(x * set1(0.70710678118654752f)));
  }
  if (kActivation == Activation::kGeluTanh) {
    const Vec y = x * fma(x * x, set1(2 * 0.79788456080286536f * 0.044715f), set1(2 * 0.79788456080286536f));
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
    case Activation::kGeluErf: return body(ActivationTag<Activation::kGeluErf>());
    case Activation::kGeluTanh: return body(ActivationTag<Activation::kGeluTanh>());
    case Activation::kRelu: return body(ActivationTag<Activation::kRelu>());
    case Activation::kSilu: return body(ActivationTag<Activation::kSilu>());
    case Activation::kNone: break;
  }
  body(ActivationTag<Activation::kNone>());
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
