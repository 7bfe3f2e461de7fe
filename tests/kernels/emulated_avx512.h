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
    simde__m256 halves[2] = {simde_mm256_cvtepi32_ps(emulated_low_epi32(x)), simde_mm256_cvtepi32_ps(emulated_high_epi32(x))};
    return simde_mm512_loadu_ps(halves);
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

#define _mm512_cvtps_epi32(x) emulated_cvtps_epi32(x)
#define _mm512_cvtepi32_ps(x) emulated_cvtepi32_ps(x)
#define _mm512_cvtepu16_epi32(x) emulated_cvtepu16_epi32(x)
#define _mm512_cvtph_ps(x) emulated_cvtph_ps(x)
#define _mm512_extractf32x8_ps(x, i) emulated_high_ps(x)
#define _mm512_extracti32x8_epi32(x, i) emulated_high_epi32(x)
#define _mm512_cvtepi32_epi16(x) emulated_cvtepi32_epi16(x)
