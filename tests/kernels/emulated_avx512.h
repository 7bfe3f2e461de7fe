// The 512-bit intrinsics on any machine, through SIMDe (Debian: libsimde-dev): included before
// everything else where a test compiles the kernels for AVX512_BF16 and VNNI without having them
// (EMULATED_BASE: for AVX512 alone).
#pragma once

#define FOLO_EMULATED 1
#define FOLO_AVX512 1
#if !defined(EMULATED_BASE)
#define FOLO_VNNI 1
#define FOLO_BF16 1
#endif
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// A macro that SIMDe 0.7 defines with the arguments of another.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)

// What SIMDe 0.7 lacks, by halves.
static inline simde__m256 emulated_high_ps(simde__m512 x) {
    simde__m256 halves[2];
    simde_mm512_storeu_ps(reinterpret_cast<float*>(halves), x);
    return halves[1];
}

static inline simde__m256i emulated_low_epi32(simde__m512i x) {
    simde__m256i halves[2];
    simde_mm512_storeu_si512(halves, x);
    return halves[0];
}

static inline simde__m256i emulated_high_epi32(simde__m512i x) {
    simde__m256i halves[2];
    simde_mm512_storeu_si512(halves, x);
    return halves[1];
}

static inline simde__m512i emulated_joined(simde__m256i low, simde__m256i high) {
    simde__m256i halves[2] = {low, high};
    return simde_mm512_loadu_si512(halves);
}

static inline simde__m512i emulated_cvtps_epi32(simde__m512 x) {
    return emulated_joined(simde_mm256_cvtps_epi32(simde_mm512_castps512_ps256(x)), simde_mm256_cvtps_epi32(emulated_high_ps(x)));
}

static inline simde__m512 emulated_cvtepi32_ps(simde__m512i x) {
    simde__m256 halves[2] = {simde_mm256_cvtepi32_ps(simde_mm512_castsi512_si256(x)), simde_mm256_cvtepi32_ps(emulated_high_epi32(x))};
    return simde_mm512_loadu_ps(halves);
}

static inline simde__m512i emulated_cvtepi8_epi32(simde__m128i x) {
    return emulated_joined(simde_mm256_cvtepi8_epi32(x), simde_mm256_cvtepi8_epi32(simde_mm_bsrli_si128(x, 8)));
}

static inline simde__m512i emulated_cvtepu16_epi32(simde__m256i x) {
    return emulated_joined(simde_mm256_cvtepu16_epi32(simde_mm256_castsi256_si128(x)),
                           simde_mm256_cvtepu16_epi32(simde_mm256_extracti128_si256(x, 1)));
}

static inline simde__m512 emulated_cvtph_ps(simde__m256i x) {
    simde__m256 halves[2] = {simde_mm256_cvtph_ps(simde_mm256_castsi256_si128(x)),
                             simde_mm256_cvtph_ps(simde_mm256_extracti128_si256(x, 1))};
    return simde_mm512_loadu_ps(halves);
}

template <typename To>
static inline auto emulated_truncated(simde__m512i x) {
    int32_t in[16];
    simde_mm512_storeu_si512(in, x);
    struct { To values[16]; } out;
    for (int i = 0; i < 16; ++i) out.values[i] = static_cast<To>(in[i]);
    return out;
}

static inline simde__m256i emulated_cvtepi32_epi16(simde__m512i x) {
    const auto narrow = emulated_truncated<int16_t>(x);
    return simde_mm256_loadu_si256(reinterpret_cast<const simde__m256i*>(&narrow));
}

// One rounding for each of the two products, what is denormal taken for zero.
static inline simde__m512 emulated_dpbf16_ps(simde__m512 sum, simde__m512i a, simde__m512i b) {
    float sums[16];
    uint32_t as[16], bs[16];
    simde_mm512_storeu_ps(sums, sum);
    simde_mm512_storeu_si512(as, a);
    simde_mm512_storeu_si512(bs, b);
    const auto flushed = [](float x) { return __builtin_fabsf(x) < __FLT_MIN__ ? __builtin_copysignf(0.0f, x) : x; };
    const auto as_float = [&](uint32_t bits) { float x; __builtin_memcpy(&x, &bits, 4); return flushed(x); };
    for (int i = 0; i < 16; ++i) {
        for (const uint32_t shift : {0, 16}) {      // the upper ones first
            const float x = as_float(as[i] << shift & 0xffff0000), y = as_float(bs[i] << shift & 0xffff0000);
            sums[i] = flushed(__builtin_fmaf(x, y, flushed(sums[i])));
        }
    }
    return simde_mm512_loadu_ps(sums);
}

static inline simde__m256i emulated_cvtneps_pbh(simde__m512 x) {
    uint32_t in[16];
    uint16_t out[16];
    simde_mm512_storeu_ps(in, x);
    for (int i = 0; i < 16; ++i) {
        const uint32_t magnitude = in[i] & 0x7fffffff;
        if (magnitude > 0x7f800000) out[i] = in[i] >> 16 | 0x40;
        else if (magnitude < 0x00800000) out[i] = in[i] >> 16 & 0x8000;
        else out[i] = (in[i] + 0x7fff + (in[i] >> 16 & 1)) >> 16;
    }
    return simde_mm256_loadu_si256(reinterpret_cast<const simde__m256i*>(out));
}

#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh(x) emulated_cvtneps_pbh(x)
#undef _mm512_dpbf16_ps
#undef __m512bh
#define __m512bh simde__m512i
#define _mm512_dpbf16_ps(sum, a, b) emulated_dpbf16_ps(sum, a, b)
#define _mm512_cvtps_epi32(x) emulated_cvtps_epi32(x)
#define _mm512_cvtepi32_ps(x) emulated_cvtepi32_ps(x)
#define _mm512_cvtepi8_epi32(x) emulated_cvtepi8_epi32(x)
#define _mm512_cvtepu16_epi32(x) emulated_cvtepu16_epi32(x)
#define _mm512_cvtph_ps(x) emulated_cvtph_ps(x)
#define _mm512_extractf32x8_ps(x, i) emulated_high_ps(x)
#define _mm512_extracti32x8_epi32(x, i) emulated_high_epi32(x)
#define _mm512_cvtepi32_epi16(x) emulated_cvtepi32_epi16(x)
