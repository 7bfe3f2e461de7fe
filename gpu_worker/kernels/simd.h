// Vectors of LANES floats or ints, 16 or 8 of them: thin names over intrinsics.
//
// Used by every kernel. Nothing here reassociates: a sum has one written order, fma is one
// rounding, and the compiler is told not to contract (-ffp-contract=off). So a result depends
// on the instruction set (which stands in the fingerprint) and on nothing else.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace folo {

using bf16 = uint16_t;      // the upper half of a float

#if defined(FOLO_AVX512)

constexpr int LANES = 16;
using F32 = __m512;
using I32 = __m512i;

inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 set1(float x) { return _mm512_set1_ps(x); }
inline I32 set1i(int32_t x) { return _mm512_set1_epi32(x); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline I32 load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline void store_ints(void* p, I32 x) { _mm512_storeu_si512(p, x); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }           // a · b + c
inline F32 fnma(F32 a, F32 b, F32 c) { return _mm512_fnmadd_ps(a, b, c); }         // c − a · b
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }                       // b where either is NaN
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }                       // likewise
inline F32 round_even(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline I32 to_int(F32 x) { return _mm512_cvtps_epi32(x); }                         // to nearest, ties to even
inline F32 to_float(I32 x) { return _mm512_cvtepi32_ps(x); }
inline I32 as_int(F32 x) { return _mm512_castps_si512(x); }
inline F32 as_float(I32 x) { return _mm512_castsi512_ps(x); }
inline I32 addi(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 andi(I32 a, I32 b) { return _mm512_and_si512(a, b); }
inline I32 ori(I32 a, I32 b) { return _mm512_or_si512(a, b); }
inline I32 maxi(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
template <int N> inline I32 shift_left(I32 x) { return _mm512_slli_epi32(x, N); }
template <int N> inline I32 shift_right(I32 x) { return _mm512_srli_epi32(x, N); }
inline I32 widen_u16(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline I32 widen_s8(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F32 widen_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void narrow_u16(uint16_t* p, I32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x)); }
inline void narrow_s8(int8_t* p, I32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x)); }   // saturating
inline F32 select_nan(F32 x, F32 if_nan, F32 otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), otherwise, if_nan);
}

// One bit a lane, the first one lowest: x ≥ bound (not for NaN).
inline uint32_t at_least(F32 x, F32 bound) { return _mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ); }

// value where x ≥ bound, else 0.
inline F32 where_at_least(F32 x, F32 bound, F32 value) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), zero(), value); }

// Lanes begin … end − 1 of x, and `otherwise` in the rest; begin and end may lie outside.
inline F32 keep_lanes(F32 x, int begin, int end, F32 otherwise) {
    const auto before = [](int lane) { return lane <= 0 ? 0u : lane >= LANES ? 0xffffu : (1u << lane) - 1; };
    return _mm512_mask_blend_ps(static_cast<uint16_t>(before(end) & ~before(begin)), otherwise, x);
}

inline __m128 lowest_four(F32 x) { return _mm512_castps512_ps128(x); }
inline __m256 half_max(F32 x) { return _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
inline __m256 half_add(F32 x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
inline __m256i half_max(I32 x) { return _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti32x8_epi32(x, 1)); }
inline __m256i half_add(I32 x) { return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti32x8_epi32(x, 1)); }

#else

constexpr int LANES = 8;
using F32 = __m256;
using I32 = __m256i;

inline F32 zero() { return _mm256_setzero_ps(); }
inline F32 set1(float x) { return _mm256_set1_ps(x); }
inline I32 set1i(int32_t x) { return _mm256_set1_epi32(x); }
inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline I32 load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
inline void store_ints(void* p, I32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 fnma(F32 a, F32 b, F32 c) { return _mm256_fnmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 round_even(F32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline I32 to_int(F32 x) { return _mm256_cvtps_epi32(x); }
inline F32 to_float(I32 x) { return _mm256_cvtepi32_ps(x); }
inline I32 as_int(F32 x) { return _mm256_castps_si256(x); }
inline F32 as_float(I32 x) { return _mm256_castsi256_ps(x); }
inline I32 addi(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
inline I32 andi(I32 a, I32 b) { return _mm256_and_si256(a, b); }
inline I32 ori(I32 a, I32 b) { return _mm256_or_si256(a, b); }
inline I32 maxi(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
template <int N> inline I32 shift_left(I32 x) { return _mm256_slli_epi32(x, N); }
template <int N> inline I32 shift_right(I32 x) { return _mm256_srli_epi32(x, N); }
inline I32 widen_u16(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline I32 widen_s8(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline F32 widen_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void narrow_u16(uint16_t* p, I32 x) {
    const __m256i packed = _mm256_packus_epi32(x, x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
inline void narrow_s8(int8_t* p, I32 x) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline F32 select_nan(F32 x, F32 if_nan, F32 otherwise) {
    return _mm256_blendv_ps(otherwise, if_nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
inline uint32_t at_least(F32 x, F32 bound) { return _mm256_movemask_ps(_mm256_cmp_ps(x, bound, _CMP_GE_OQ)); }
inline F32 where_at_least(F32 x, F32 bound, F32 value) { return _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_GE_OQ), value); }

// Lanes begin … end − 1 of x, and `otherwise` in the rest; begin and end may lie outside.
inline F32 keep_lanes(F32 x, int begin, int end, F32 otherwise) {
    const I32 lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const I32 kept = _mm256_and_si256(_mm256_cmpgt_epi32(lane, set1i(begin - 1)), _mm256_cmpgt_epi32(set1i(end), lane));
    return _mm256_blendv_ps(otherwise, x, as_float(kept));
}

inline __m128 lowest_four(F32 x) { return _mm256_castps256_ps128(x); }
inline __m256 half_max(F32 x) { return x; }
inline __m256 half_add(F32 x) { return x; }
inline __m256i half_max(I32 x) { return x; }
inline __m256i half_add(I32 x) { return x; }

#endif

inline float first_of(F32 x) { return _mm_cvtss_f32(lowest_four(x)); }

// One written order: halves, quarters, pairs.
inline float sum_of(F32 x) {
    const __m256 eight = half_add(x);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline float max_of(F32 x) {        // any number where a lane is NaN
    const __m256 eight = half_max(x);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline int32_t sum_of(I32 x) {
    const __m256i eight = half_add(x);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

inline int32_t max_of(I32 x) {
    const __m256i eight = half_max(x);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

inline float bits_as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t float_as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

// bfloat16: upper halves of floats rounded to nearest, ties to even, in the lower half of each int; NaN stays one.
inline I32 rounded_bf16(F32 x) {
    const I32 bits = as_int(x);
    const I32 odd = andi(shift_right<16>(bits), set1i(1));
    const F32 rounded = as_float(addi(addi(bits, set1i(0x7fff)), odd));
    return shift_right<16>(as_int(select_nan(x, as_float(set1i(0x7fc00000)), rounded)));
}

// The floats whose upper halves stand in the upper halves of x. (Of 16 registers none is left for
// the mask where a product needs them: there it is read from memory, which the compiler may not undo.)
inline F32 upper_half(I32 x) {
#if defined(FOLO_AVX512)
    return as_float(andi(x, set1i(static_cast<int32_t>(0xffff0000))));
#else
    alignas(32) static const volatile uint32_t MASK[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
    return as_float(andi(x, *reinterpret_cast<const volatile I32*>(MASK)));
#endif
}

// A vector of activations or of K/V, whatever they are stored as.
inline F32 load_as_float(const float* p) { return load(p); }
inline F32 load_as_float(const bf16* p) { return as_float(shift_left<16>(widen_u16(p))); }
inline void store_from_float(float* p, F32 x) { store(p, x); }
inline void store_from_float(bf16* p, F32 x) { narrow_u16(p, rounded_bf16(x)); }

#if defined(FOLO_BF16)
// Two neighbours in every lane.
inline I32 broadcast_pair(const bf16* p) { int32_t pair; std::memcpy(&pair, p, 4); return set1i(pair); }

// sum + a · b in each lane, of two bfloat16 products: what stands in the upper halves, then the lower.
inline F32 dot_pairs(F32 sum, I32 a, I32 b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// Rounded to nearest, by the instruction that takes what is denormal for zero.
inline void store_as_factors(bf16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x)); }
#endif

// e^x to about 1 ulp (Cephes' polynomial) for x in [−87.3, 88], the ends beyond; NaN for NaN.
inline F32 exp(F32 x) {
    const F32 clamped = min(set1(88.0f), max(set1(-87.3f), x));
    const F32 n = round_even(mul(clamped, set1(1.44269504088896341f)));
    F32 r = fnma(n, set1(0.693359375f), clamped);
    r = fnma(n, set1(-2.12194440e-4f), r);
    F32 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = add(fma(mul(r, r), p, r), set1(1.0f));
    return mul(p, as_float(shift_left<23>(addi(to_int(n), set1i(127)))));
}

// 2^x to about 1 ulp (Cephes' polynomial) for x up to 127; 2^−126 for what is below that, NaN for NaN.
inline F32 exp2(F32 x) {
    const F32 clamped = max(set1(-126.0f), x);
    const F32 n = round_even(clamped);
    const F32 r = sub(clamped, n);
    F32 p = set1(1.535336188319500e-4f);
    p = fma(p, r, set1(1.339887440266574e-3f));
    p = fma(p, r, set1(9.618437357674640e-3f));
    p = fma(p, r, set1(5.550332471162809e-2f));
    p = fma(p, r, set1(2.402264791363012e-1f));
    p = fma(p, r, set1(6.931472028550421e-1f));
    p = fma(p, r, set1(1.0f));
    return mul(p, as_float(shift_left<23>(addi(to_int(n), set1i(127)))));
}

}  // namespace folo
