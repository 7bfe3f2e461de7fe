// The inner loops of matrix products: one step takes 64 bytes of each panel and a few inputs of each row.
//
// Used by linear.cpp and linear_integer.cpp. A `Dot` says how a step's weights and inputs are read and
// multiplied: in one part, or in two where an instruction takes every other weight only. Integer weights
// are unsigned, since that is what the instructions want: 8-bit weights lie 128 higher than they are
// (whoever sums takes 128 · the sum of the inputs off again), 4-bit weights are what a file holds, 0 … 15.
// Inputs of integer products lie in [−128, 127]; their sums are exact.
#pragma once

#include "simd.h"

#define FOLO_UNROLL _Pragma("GCC unroll 8")

namespace folo {

constexpr int PANEL = 16;                   // outputs whose weights lie together
constexpr int STEP = 64;                    // bytes of a panel
constexpr int HALVES = PANEL / LANES;       // vectors in a step
constexpr int PREFETCH = 2048;              // bytes ahead, where memory is the limit

// 32-bit lanes: GCC keeps accumulators of the instructions' own type in their registers, and moves
// those of type I32 (64-bit lanes) about.
typedef int32_t Sums __attribute__((vector_size(sizeof(I32))));

#if defined(FOLO_AVX512)
inline I32 loadi(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline I32 pair_products_s16(I32 a, I32 b) { return _mm512_madd_epi16(a, b); }       // → 32 bits
inline I32 pair_products_u8s8(I32 a, I32 b) { return _mm512_maddubs_epi16(a, b); }   // → 16 bits, saturating
template <int N> inline I32 shift_words_right(I32 x) { return _mm512_srli_epi16(x, N); }
inline void add_product(F32& sum, F32 x, F32 w) { sum = fma(x, w, sum); }
inline void add_longs(Sums& sum, I32 x) { sum += (Sums)x; }
inline void add_words(Sums& sum, I32 x) { sum = (Sums)_mm512_add_epi16((I32)sum, x); }
#else
inline I32 loadi(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline I32 pair_products_s16(I32 a, I32 b) { return _mm256_madd_epi16(a, b); }
inline I32 pair_products_u8s8(I32 a, I32 b) { return _mm256_maddubs_epi16(a, b); }
template <int N> inline I32 shift_words_right(I32 x) { return _mm256_srli_epi16(x, N); }
// With 16 registers GCC writes sums to the inputs' registers, and spills; told to add in place it does not.
inline void add_product(F32& sum, F32 x, F32 w) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w)); }
inline void add_longs(Sums& sum, I32 x) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline void add_words(Sums& sum, I32 x) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }
#endif

inline I32 broadcast_four_bytes(const uint8_t* p) { int32_t four; std::memcpy(&four, p, 4); return set1i(four); }

// 16 float weights of one input.
struct Float32Dot {
    static constexpr int PARTS = 1, INPUTS = 1, INPUT_BYTES = 4;       // INPUTS and their bytes in a step
    using Sum = F32;
    using Vector = F32;
    template <int> static F32 weights(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
    template <int> static F32 inputs(const uint8_t* p) { return as_float(broadcast_four_bytes(p)); }
    static void add(F32& sum, F32 w, F32 x) { add_product(sum, x, w); }
};

// Pairs of bfloat16.
struct Bf16Dot {
    static constexpr int INPUTS = 2;
    using Sum = F32;
#if defined(FOLO_BF16)
    static constexpr int PARTS = 1, INPUT_BYTES = 4;
    using Vector = I32;
    template <int> static I32 weights(const uint8_t* p) { return loadi(p); }
    template <int> static I32 inputs(const uint8_t* p) { return broadcast_four_bytes(p); }
    static void add(F32& sum, I32 w, I32 x) { sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }
#else
    // As floats, first the even inputs, then the odd ones; a panel's weights when they are read, the inputs beforehand.
    static constexpr int PARTS = 2, INPUT_BYTES = 8;
    using Vector = F32;
    using Wide = float;
    template <int PART> static F32 half(I32 pair) { return as_float(PART ? andi(pair, set1i(0xffff0000)) : shift_left<16>(pair)); }
    template <int PART> static F32 weights(const uint8_t* p) { return half<PART>(loadi(p)); }
    template <int PART> static F32 inputs(const uint8_t* p) { return as_float(broadcast_four_bytes(p + 4 * PART)); }
    static void add(F32& sum, F32 w, F32 x) { add_product(sum, x, w); }
    static void widen(const uint8_t* x, int width, float* to) {
        for (int i = 0; i < width; i += LANES) store(to + i, load_as_float(reinterpret_cast<const bf16*>(x) + i));
    }
#endif
};

// Fours of 8-bit weights.
struct Int8Dot {
    static constexpr int INPUTS = 4;
    using Sum = Sums;
    using Vector = I32;
#if defined(FOLO_VNNI)
    static constexpr int PARTS = 1, INPUT_BYTES = 4;
    template <int> static I32 weights(const uint8_t* p) { return loadi(p); }
    template <int> static I32 inputs(const uint8_t* p) { return broadcast_four_bytes(p); }
    static void add(Sums& sum, I32 w, I32 x) { sum = (Sums)_mm512_dpbusd_epi32((I32)sum, w, x); }
#else
    // As words: the products of two bytes would not fit into one. A word of weights gives its even and its
    // odd byte by one operation each, so the inputs are widened beforehand, in the order 0 2 1 3.
    static constexpr int PARTS = 2, INPUT_BYTES = 8;
    using Wide = int16_t;
    template <int PART> static I32 weights(const uint8_t* p) {
        return PART ? shift_words_right<8>(loadi(p)) : andi(loadi(p), set1i(0x00ff00ff));
    }
    template <int PART> static I32 inputs(const uint8_t* p) { return broadcast_four_bytes(p + 4 * PART); }
    static void add(Sums& sum, I32 w, I32 x) { add_longs(sum, pair_products_s16(w, x)); }
    static void widen(const uint8_t* x, int width, int16_t* to) {
        const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
        for (int i = 0; i < width; i += 16) {
            const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)), order);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtepi8_epi16(bytes));
        }
    }
#endif
};

// Fours of 4-bit weights, in lower and upper halves of bytes: the second four is 16 inputs further on.
struct Int4Dot {
    static constexpr int PARTS = 2, INPUTS = 8, INPUT_BYTES = 4;
    using Sum = Sums;
    using Vector = I32;
    template <int PART> static I32 weights(const uint8_t* p) {
        return andi(PART ? shift_words_right<4>(loadi(p)) : loadi(p), set1i(0x0f0f0f0f));
    }
    template <int PART> static I32 inputs(const uint8_t* p) { return broadcast_four_bytes(p + 16 * PART); }
#if defined(FOLO_VNNI)
    static void add(Sums& sum, I32 w, I32 x) { sum = (Sums)_mm512_dpbusd_epi32((I32)sum, w, x); }
    static I32 total(Sums sum) { return (I32)sum; }
#else
    // The sums of 32 inputs fit into 16 bits: two lanes of at most 16 · 15 · 128 = 30,720.
    static void add(Sums& sum, I32 w, I32 x) { add_words(sum, pair_products_u8s8(w, x)); }
    static I32 total(Sums sum) { return pair_products_s16((I32)sum, set1i(0x00010001)); }
#endif
};

template <typename Dot, int PART, int R, int V, int P>
[[gnu::always_inline]] inline void add_part(typename Dot::Sum (&sum)[R][V], const uint8_t* const (&panels)[P],
                                            const uint8_t* const (&rows)[R], int64_t step) {
    typename Dot::Vector weights[V];
    FOLO_UNROLL for (int v = 0; v < V; ++v) {
        weights[v] = Dot::template weights<PART>(panels[v / HALVES] + step * STEP + v % HALVES * 4 * LANES);
    }
    FOLO_UNROLL for (int r = 0; r < R; ++r) {
        const typename Dot::Vector inputs = Dot::template inputs<PART>(rows[r] + step * Dot::INPUT_BYTES);
        FOLO_UNROLL for (int v = 0; v < V; ++v) Dot::add(sum[r][v], weights[v], inputs);
    }
}

// sum [rows][vectors of outputs] += `steps` steps of the rows and panels that start at these addresses.
template <typename Dot, int R, int V, int P>
[[gnu::always_inline]] inline void add_steps(typename Dot::Sum (&sum)[R][V], const uint8_t* const (&panels)[P],
                                             const uint8_t* const (&rows)[R], int64_t steps) {
    static_assert(V == P * HALVES);
    for (int64_t step = 0; step < steps; ++step) {
        if (R <= 4) {
            FOLO_UNROLL for (int p = 0; p < P; ++p) __builtin_prefetch(panels[p] + step * STEP + PREFETCH);
        }
        add_part<Dot, 0>(sum, panels, rows, step);
        if (Dot::PARTS == 2) {
            asm volatile("" ::: "memory");      // read again for the second part: both at once need too many registers
            add_part<Dot, Dot::PARTS - 1>(sum, panels, rows, step);
        }
    }
}

// The same addresses, so many bytes further on.
template <int N>
struct Addresses {
    const uint8_t* at[N];
    [[gnu::always_inline]] Addresses(const uint8_t* const (&from)[N], int64_t bytes) {
        FOLO_UNROLL for (int i = 0; i < N; ++i) at[i] = from[i] + bytes;
    }
};

}  // namespace folo
