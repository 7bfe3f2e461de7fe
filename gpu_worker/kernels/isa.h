// Which instructions this library is compiled for: the only file that asks the compiler.
//
// FOLO_AVX512   512-bit vectors (F, BW, DQ, VL)      else 256-bit ones (AVX2, FMA, F16C)
// FOLO_VNNI     int8 dot products in one instruction (512-bit)
// FOLO_BF16     bfloat16 dot products in one instruction (512-bit)
//
// FOLO_EMULATED: a test has defined these, and the intrinsics, itself.
#pragma once

#if !defined(FOLO_EMULATED)
#include <immintrin.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FOLO_AVX512 1
#endif
#if defined(FOLO_AVX512) && defined(__AVX512VNNI__)
#define FOLO_VNNI 1
#endif
#if defined(FOLO_AVX512) && defined(__AVX512BF16__)
#define FOLO_BF16 1
#endif
#endif
