// What happens to rows between two matrix products, but for attention.
//
// T is float or bf16: what rows are kept as between operators; arithmetic is float, with one
// rounding at the end of each operator. Units of work are rows.
#pragma once

#include "rows.h"
#include "team.h"

namespace folo {

// What a norm and an activation hand on.
enum class Output : int32_t { rows = 0, per_token = 1, per_group = 2 };

// hidden += added (where given), then normed = hidden / rms(hidden) · weight, perhaps quantized.
template <typename T>
struct NormArguments {
    T* hidden;                      // [rows, width]
    const T* added;                 // [rows, width] or null
    const T* weight;                // [width]
    float eps;
    int32_t rows, width;
    Output output;
    T* normed;                      // [rows, width], for Output::rows
    QuantizedRows quantized;        // for the others
};

// silu(gate) · up, perhaps quantized.
template <typename T>
struct ActivationArguments {
    const T* gate_up;               // [rows, 2 · width]: gate, then up
    int32_t rows, width;
    Output output;
    T* activated;                   // [rows, width]
    QuantizedRows quantized;
};

template <typename T> void add_norm(Team& team, const NormArguments<T>& a);
template <typename T> void silu_multiply(Team& team, const ActivationArguments<T>& a);

// Rows as they stand to int8, per token or per group.
template <typename T> void quantize_rows(Team& team, const T* x, int rows, int width, Output output, QuantizedRows to);

}  // namespace folo
