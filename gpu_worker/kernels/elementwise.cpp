// Norms, activation and quantization of rows. Theory and shapes: elementwise.h.

#include "elementwise.h"

#include <cmath>

namespace folo {

namespace {

template <typename T>
void hand_on(const float* row, int64_t r, int width, Output output, T* rows, QuantizedRows to) {
    switch (output) {
        case Output::rows:
            for (int i = 0; i < width; i += LANES) store_from_float(rows + r * width + i, load(row + i));
            return;
        case Output::per_token:
            to.sums[r] = quantize(row, width, to.values + r * width, to.scales + r);
            return;
        case Output::per_group:
            for (int g = 0; g < width / GROUP; ++g) {
                const int64_t group = r * (width / GROUP) + g;
                to.sums[group] = quantize(row + g * GROUP, GROUP, to.values + group * GROUP, to.scales + group);
            }
    }
}

}  // namespace

template <typename T>
void add_norm(Team& team, const NormArguments<T>& a) {
    team.for_each(a.rows, [&](int64_t r) {
        float row[MAX_WIDTH];
        T* hidden = a.hidden + r * a.width;
        F32 squares[2] = {zero(), zero()};      // two sums, by the parity of the vector
        for (int i = 0; i < a.width; i += LANES) {
            if (a.added) store_from_float(hidden + i, add(load_as_float(hidden + i), load_as_float(a.added + r * a.width + i)));
            const F32 x = load_as_float(hidden + i);
            F32& sum = squares[i / LANES % 2];
            sum = fma(x, x, sum);
        }
        const float mean = sum_of(add(squares[0], squares[1])) / a.width;
        const F32 factor = set1(1.0f / std::sqrt(mean + a.eps));
        for (int i = 0; i < a.width; i += LANES) {
            store(row + i, mul(mul(load_as_float(hidden + i), factor), load_as_float(a.weight + i)));
        }
        hand_on(row, r, a.width, a.output, a.normed, a.quantized);
    });
}

template <typename T>
void silu_multiply(Team& team, const ActivationArguments<T>& a) {
    team.for_each(a.rows, [&](int64_t r) {
        float row[MAX_WIDTH];
        const T* gate = a.gate_up + 2 * r * a.width;
        for (int i = 0; i < a.width; i += LANES) {
            const F32 x = load_as_float(gate + i);
            const F32 silu = div(x, add(set1(1.0f), exp(sub(zero(), x))));
            store(row + i, mul(silu, load_as_float(gate + a.width + i)));
        }
        hand_on(row, r, a.width, a.output, a.activated, a.quantized);
    });
}

template <typename T>
void quantize_rows(Team& team, const T* x, int rows, int width, Output output, QuantizedRows to) {
    team.for_each(rows, [&](int64_t r) {
        float row[MAX_WIDTH];
        for (int i = 0; i < width; i += LANES) store(row + i, load_as_float(x + r * width + i));
        hand_on<T>(row, r, width, output, nullptr, to);
    });
}

#define INSTANTIATE(T)                                                                    \
    template void add_norm<T>(Team&, const NormArguments<T>&);                            \
    template void silu_multiply<T>(Team&, const ActivationArguments<T>&);                 \
    template void quantize_rows<T>(Team&, const T*, int, int, Output, QuantizedRows);
INSTANTIATE(float)
INSTANTIATE(bf16)
#undef INSTANTIATE

}  // namespace folo

// ---- C ABI: each with a team of its own. bfloat16 where `is_bf16`, else float. ----

using namespace folo;

template <typename T>
static void run_add_norm(void* hidden, const void* added, const void* weight, float eps, int rows, int width, int output,
                         void* normed, int8_t* values, float* scales, int32_t* sums, int threads) {
    const NormArguments<T> a{static_cast<T*>(hidden), static_cast<const T*>(added), static_cast<const T*>(weight), eps, rows, width,
                             static_cast<Output>(output), static_cast<T*>(normed), {values, scales, sums}};
    run_team(threads, [&](Team& team) { add_norm(team, a); });
}

template <typename T>
static void run_silu_multiply(const void* gate_up, int rows, int width, int output, void* activated, int8_t* values,
                              float* scales, int32_t* sums, int threads) {
    const ActivationArguments<T> a{static_cast<const T*>(gate_up), rows, width, static_cast<Output>(output),
                                   static_cast<T*>(activated), {values, scales, sums}};
    run_team(threads, [&](Team& team) { silu_multiply(team, a); });
}

template <typename T>
static void run_quantize_rows(const void* x, int rows, int width, int output, int8_t* values, float* scales, int32_t* sums,
                              int threads) {
    run_team(threads, [&](Team& team) {
        quantize_rows(team, static_cast<const T*>(x), rows, width, static_cast<Output>(output), QuantizedRows{values, scales, sums});
    });
}

#pragma GCC visibility push(default)
extern "C" {

void folo_add_norm(int is_bf16, void* hidden, const void* added, const void* weight, float eps, int rows, int width, int output,
                   void* normed, int8_t* values, float* scales, int32_t* sums, int threads) {
    (is_bf16 ? run_add_norm<bf16> : run_add_norm<float>)(hidden, added, weight, eps, rows, width, output, normed, values, scales, sums,
                                                         threads);
}

void folo_silu_multiply(int is_bf16, const void* gate_up, int rows, int width, int output, void* activated, int8_t* values,
                        float* scales, int32_t* sums, int threads) {
    (is_bf16 ? run_silu_multiply<bf16> : run_silu_multiply<float>)(gate_up, rows, width, output, activated, values, scales, sums, threads);
}

void folo_quantize_rows(int is_bf16, const void* x, int rows, int width, int output, int8_t* values, float* scales, int32_t* sums,
                        int threads) {
    (is_bf16 ? run_quantize_rows<bf16> : run_quantize_rows<float>)(x, rows, width, output, values, scales, sums, threads);
}

}
#pragma GCC visibility pop
