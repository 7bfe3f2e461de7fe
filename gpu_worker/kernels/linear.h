// Matrix products: y [rows, n] = x [rows, k] · Wᵀ (+ bias), weights in panels of 16 outputs.
//
// The threads of a team share a product. The number of rows chooses the schedule (tiles,
// units of work), never the arithmetic: an output is one chain of operations over its k inputs,
// written below, wherever its row stands and whatever stands beside it.
//
// A panel holds 16 outputs' weights for all inputs, in the order in which they are used; n is
// padded to whole panels, k is a multiple of 32. Panels, by kind (fp16 numbers as GGUF has them):
//   float32       [k][16] floats
//   bf16          [k / 2][16][2]
//   int8          [k / 4][16][4] bytes, each weight + 128
//   int8_blocks   per 64 inputs: 2 × 16 fp16 d, then as int8; where the last 32 are alone, their half of that
//   int4_blocks   per 32 inputs: [4][16][4] bytes, then 16 fp16 d, 16 fp16 m. Byte i of vector v holds
//                 input 4v + i in its lower half, input 16 + 4v + i in its upper half.
//
// Arithmetic, by kind and input; (·) is one rounding, all float:
//   float32, float32 input      sum = fma(x, w, sum), inputs ascending, from 0 in each block of k_block
//   bf16, bf16 input            inputs and so on; the blocks' sums are added in ascending order. Two at a time
//                               by the CPU's own instruction where it has one, else as float32.
//   int8, input per token       (exact sum over k · scale of the row) · scale of the output
//   int8, input per group       sum = fma(scale of the group, exact sum of the group, sum), groups ascending;
//                               then (sum · scale of the output)
//   int8_blocks, per group      sum = fma((d · scale of the group), exact sum of the group, sum), groups ascending
//   int4_blocks, per group      w = d · q + m: sum = fma(m, (scale of the group · the group's sum of inputs), sum);
//                               sum = fma((d · scale of the group), exact sum of q · x, sum); groups ascending
// and last (… + bias), then one rounding to what rows are kept as.
#pragma once

#include "rows.h"
#include "team.h"

namespace folo {

enum class WeightKind : int32_t { float32 = 0, bf16 = 1, int8 = 2, int8_blocks = 3, int4_blocks = 4 };

// Mirrored by linear.py.
struct LinearWeight {
    WeightKind kind;
    int32_t n, k;
    int32_t k_block;                // inputs, a multiple of 32, at most k; for float32 and bf16
    const uint8_t* panels;
    const float* scales;            // [n padded], for int8; else null
    const float* bias;              // [n padded], or null
};

enum class InputKind : int32_t { float32 = 0, bf16 = 1, per_token = 2, per_group = 3 };

constexpr int input_bytes(InputKind kind) { return kind == InputKind::float32 ? 4 : kind == InputKind::bf16 ? 2 : 1; }

// Mirrored by linear.py. For quantized kinds the parts of QuantizedRows.
struct LinearInput {
    InputKind kind;
    int32_t rows;
    const void* values;
    const float* scales;
    const int32_t* sums;
};

// T: float or bf16, what y is stored as.
template <typename T> void linear(Team& team, const LinearWeight& weight, const LinearInput& input, T* y);

}  // namespace folo
