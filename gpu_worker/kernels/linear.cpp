// Matrix products of float weights; which kernel a product runs on; the C ABI. Arithmetic: linear.h.

#include "linear_tiles.h"

namespace folo {

namespace {

template <typename Dot>
struct FloatRows {
    static int64_t panel_bytes(int k) { return (int64_t)k / Dot::INPUTS * STEP; }

    template <int R> using Inputs = RowInputs<Dot, R>;

    template <int R, int P>
    static void tile(const LinearWeight& w, const uint8_t* const (&panels)[P], const Inputs<R>& x, float (&to)[R][P * PANEL]) {
        constexpr int V = P * HALVES;
        for (int start = 0; start < w.k; start += w.k_block) {
            const int inputs = start + w.k_block <= w.k ? w.k_block : w.k - start;
            F32 sum[R][V];
            FOLO_UNROLL for (int r = 0; r < R; ++r) {
                FOLO_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = zero();
            }
            const int64_t step = start / Dot::INPUTS;
            add_steps<Dot>(sum, Addresses<P>(panels, step * STEP).at, Addresses<R>(x.rows, step * Dot::INPUT_BYTES).at,
                           inputs / Dot::INPUTS);
            FOLO_UNROLL for (int r = 0; r < R; ++r) {
                FOLO_UNROLL for (int v = 0; v < V; ++v) {
                    float* block = to[r] + v * LANES;
                    store(block, start == 0 ? sum[r][v] : add(load(block), sum[r][v]));
                }
            }
        }
    }
};

}  // namespace

template <typename T>
void linear(Team& team, const LinearWeight& w, const LinearInput& x, T* y) {
    const LinearOutput output{y, sizeof(T) == sizeof(bf16)};
    switch (w.kind) {
        case WeightKind::float32: return multiply<FloatRows<Float32Dot>>(team, w, x, output);
        case WeightKind::bf16: return multiply<FloatRows<Bf16Dot>>(team, w, x, output);
        case WeightKind::int8: return (x.kind == InputKind::per_token ? int8_per_token : int8_per_group)(team, w, x, output);
        case WeightKind::int8_blocks: return int8_blocks(team, w, x, output);
        case WeightKind::int4_blocks: return int4_blocks(team, w, x, output);
    }
}

template void linear<float>(Team&, const LinearWeight&, const LinearInput&, float*);
template void linear<bf16>(Team&, const LinearWeight&, const LinearInput&, bf16*);

}  // namespace folo

using namespace folo;

#pragma GCC visibility push(default)
extern "C" {

void folo_linear(int is_bf16, const LinearWeight* weight, const LinearInput* input, void* y, int threads) {
    run_team(threads, [&](Team& team) {
        if (is_bf16) linear(team, *weight, *input, static_cast<bf16*>(y));
        else linear(team, *weight, *input, static_cast<float*>(y));
    });
}

}
#pragma GCC visibility pop
