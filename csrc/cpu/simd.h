// One vector of floats per instruction set: 16 lanes with AVX-512, 8 with AVX2, 4 by GCC's vector
// extension elsewhere.
//
// Elements are loaded from and stored to float, Half and BFloat16; every computation is in fp32.
// Conversions to 16 bits round to nearest even and keep NaN a NaN. load_partial fills the missing
// lanes with zeros and reads nothing past n.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/types.h"

#if defined(__AVX2__)
// GCC 12 takes the deliberately undefined operands inside its own intrinsics for uninitialised
// variables (PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

#define EET_INLINE inline __attribute__((always_inline))

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

EET_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
EET_INLINE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
constexpr float kInfinity = __builtin_inff();

#if defined(__AVX512F__)

constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
EET_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
EET_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
EET_INLINE Vec load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
EET_INLINE Vec widen_bfloat16(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
EET_INLINE Vec load(const BFloat16* p) {
  return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
EET_INLINE __mmask16 first_lanes(int64_t n) {
  return __mmask16(n >= 16 ? 0xffffu : (1u << n) - 1u);
}
EET_INLINE Vec load_partial(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
EET_INLINE Vec load_partial(const Half* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}
EET_INLINE Vec load_partial(const BFloat16* p, int64_t n) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
EET_INLINE __m256i narrow_half(Vec x) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }
EET_INLINE __m256i narrow_bfloat16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
EET_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
EET_INLINE void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_half(x));
}
EET_INLINE void store(BFloat16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(x));
}
EET_INLINE void store_partial(float* p, Vec x, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), x.v);
}
EET_INLINE void store_partial(Half* p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_half(x));
}
EET_INLINE void store_partial(BFloat16* p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bfloat16(x));
}
EET_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
EET_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
EET_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
EET_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
EET_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
EET_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
EET_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
EET_INLINE Vec round_nearest(Vec x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x * 2^n for integral n in [-126, 127]
EET_INLINE Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
// a < b ? yes : no, lane by lane (no where unordered)
EET_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
EET_INLINE Vec select_first(Vec x, int64_t n, Vec other) {  // x in the first n lanes
  return {_mm512_mask_blend_ps(first_lanes(n), other.v, x.v)};
}
EET_INLINE float reduce_add(Vec x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
EET_INLINE float reduce_max(Vec x) {
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
// rows of a 16 x 16 block become its columns: 4-byte, 8-byte, then two rounds of 16-byte
// interleaves
EET_INLINE void transpose(Vec (&r)[kLanes]) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
struct Vec {
  __m256 v;
};
EET_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
EET_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
EET_INLINE Vec load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
EET_INLINE Vec load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
EET_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
EET_INLINE void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
EET_INLINE void store(BFloat16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
EET_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
EET_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
EET_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
EET_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
EET_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
EET_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
EET_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
EET_INLINE Vec round_nearest(Vec x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
EET_INLINE Vec scale_by_power(Vec x, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
EET_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
EET_INLINE __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane);
}
EET_INLINE Vec select_first(Vec x, int64_t n, Vec other) {
  return {_mm256_blendv_ps(other.v, x.v, _mm256_castsi256_ps(first_lanes(n)))};
}
EET_INLINE Vec load_partial(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, first_lanes(n))};
}
EET_INLINE void store_partial(float* p, Vec x, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes(n), x.v);
}
EET_INLINE float reduce_add(Vec x) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
EET_INLINE float reduce_max(Vec x) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
EET_INLINE void transpose(Vec (&r)[kLanes]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}

#else

constexpr int kLanes = 4;
typedef float FloatLanes __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(16)));
struct Vec {
  FloatLanes v;
};
EET_INLINE float to_float(Half x) {  // scaling by 2^112 rebiases normals and normalises subnormals
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000)
                                                                     << 16;
  const uint32_t bits =
      (x.bits & 0x7c00) == 0x7c00
          ? magnitude | 0x7f800000u
          : float_bits(bits_float(magnitude) * bits_float(uint32_t(127 + 112) << 23));
  return bits_float(bits | sign);
}
EET_INLINE Half to_half(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
  if (magnitude <
      0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return {uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
}
EET_INLINE float to_float(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
EET_INLINE BFloat16 to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
EET_INLINE Vec set1(float x) { return {FloatLanes{x, x, x, x}}; }
EET_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x.v, p, sizeof(x.v));
  return x;
}
EET_INLINE Vec load(const Half* p) {
  return {FloatLanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
EET_INLINE Vec load(const BFloat16* p) {
  return {FloatLanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
EET_INLINE void store(float* p, Vec x) { std::memcpy(p, &x.v, sizeof(x.v)); }
EET_INLINE void store(Half* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_half(x.v[i]);
}
EET_INLINE void store(BFloat16* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_bfloat16(x.v[i]);
}
EET_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
EET_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
EET_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
EET_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
EET_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
EET_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
EET_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
EET_INLINE Vec round_nearest(Vec x) {  // |x| < 2^22: adding 1.5 * 2^23 drops the fraction
  const FloatLanes magic = set1(12582912.0f).v;
  return {(x.v + magic) - magic};
}
EET_INLINE Vec scale_by_power(Vec x, Vec n) {
  Vec power;
  IntLanes exponent = (__builtin_convertvector(n.v, IntLanes) + 127) << 23;
  std::memcpy(&power.v, &exponent, sizeof(exponent));
  return x * power;
}
EET_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return {a.v < b.v ? yes.v : no.v}; }
EET_INLINE Vec select_first(Vec x, int64_t n, Vec other) {
  const IntLanes lane = {0, 1, 2, 3};
  const int32_t m = int32_t(n);
  return {lane < IntLanes{m, m, m, m} ? x.v : other.v};
}
EET_INLINE float reduce_add(Vec x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }
EET_INLINE float reduce_max(Vec x) {
  const float a = x.v[0] > x.v[2] ? x.v[0] : x.v[2], b = x.v[1] > x.v[3] ? x.v[1] : x.v[3];
  return a > b ? a : b;
}
EET_INLINE void transpose(Vec (&r)[kLanes]) {
  const FloatLanes a = r[0].v, b = r[1].v, c = r[2].v, d = r[3].v;
  for (int i = 0; i < 4; ++i) r[i].v = FloatLanes{a[i], b[i], c[i], d[i]};
}

#endif

#if !defined(__AVX512F__)  // no masked 16-bit accesses: through a buffer of one vector
template <typename T>
EET_INLINE Vec load_partial(const T* p, int64_t n) {
  T buffer[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) {
      buffer[i] = p[i];
    } else {
      std::memset(&buffer[i], 0, sizeof(T));
    }
  }
  return load(buffer);
}
template <typename T>
EET_INLINE void store_partial(T* p, Vec x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  for (int64_t i = 0; i < n && i < kLanes; ++i) p[i] = buffer[i];
}
#endif

template <typename T>
EET_INLINE Vec load_upto(const T* p, int64_t n) {  // n may be a whole vector or more
  return n >= kLanes ? load(p) : load_partial(p, n);
}
template <typename T>
EET_INLINE void store_upto(T* p, Vec x, int64_t n) {
  if (n >= kLanes) {
    store(p, x);
  } else {
    store_partial(p, x, n);
  }
}
EET_INLINE Vec zero() { return set1(0.0f); }

// Calls body(T()) for the element type of dtype.
template <typename Body>
EET_INLINE void for_dtype(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) {
    body(float());
  } else if (dtype == DType::kFloat16) {
    body(Half());
  } else {
    body(BFloat16());
  }
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
