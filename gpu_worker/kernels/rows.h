// Activations between two operators: rows of floats, bfloat16, or int8 with scales.
//
// Shapes are [rows, width], one row after another. K of every product is a multiple of 32.
#pragma once

#include <cstdint>

#include "simd.h"

namespace folo {

constexpr int GROUP = 32;           // inputs that share a scale, where a product wants groups
constexpr int MAX_WIDTH = 32768;    // inputs of a product: up to 6 rows lie on the stack, as floats

// int8 rows: value = values · scale of the row, or of the group of 32 within it.
struct QuantizedRows {
    int8_t* values;                 // [rows, width], in [−127, 127]
    float* scales;                  // [rows], or [rows, width / 32]
    int32_t* sums;                  // of the values, likewise
};

// One row, or one group of it, to int8: symmetric, to nearest. Not-finite input makes the scale
// so, and with it every product of the row: it fails there, alone. Where 127 / the largest would be
// infinite, the values are zeros. Returns the values' sum.
template <typename T>
inline int32_t quantize(const T* x, int width, int8_t* values, float* scale) {
    I32 largest = set1i(0);          // of the bits of |x|: NaN is above infinity, infinity above all
    for (int i = 0; i < width; i += LANES) largest = maxi(largest, andi(as_int(load_as_float(x + i)), set1i(0x7fffffff)));
    const float top = bits_as_float(max_of(largest));
    const F32 inverse = set1(top > 1e-36f ? 127.0f / top : 0.0f);
    I32 all = set1i(0);
    for (int i = 0; i < width; i += LANES) {
        const I32 rounded = to_int(mul(load_as_float(x + i), inverse));
        narrow_s8(values + i, rounded);
        all = addi(all, rounded);
    }
    *scale = top / 127.0f;
    return sum_of(all);
}

}  // namespace folo
