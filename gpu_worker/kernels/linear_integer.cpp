// Matrix products of integer weights and quantized rows. Arithmetic and panels: linear.h.

#include "linear_tiles.h"

namespace folo {

namespace {

constexpr int GROUP_STEPS = GROUP / Int8Dot::INPUTS;
constexpr int INT8_GROUP_BYTES = GROUP_STEPS * STEP, INT8_SCALES_BYTES = 2 * PANEL * 2;     // scales of two groups
constexpr int INT4_GROUP_BYTES = 4 * STEP, INT4_BLOCK_BYTES = INT4_GROUP_BYTES + 2 * PANEL * 2;

inline const uint16_t* halves_at(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

// A tile's rows, with their scales and sums.
template <typename Dot, int R>
struct QuantizedInputs : RowInputs<Dot, R> {
    const float* scales[R];
    const int32_t* sums[R];
    QuantizedInputs(const LinearWeight& w, const LinearInput& x, const TileRows<R>& rows_of) : RowInputs<Dot, R>(w, x, rows_of) {
        const int parts = x.kind == InputKind::per_group ? w.k / GROUP : 1;
        for (int r = 0; r < R; ++r) {
            scales[r] = x.scales + rows_of.at[r] * parts;
            sums[r] = x.sums + rows_of.at[r] * parts;
        }
    }
};

template <int R, int N>
[[gnu::always_inline]] inline void clear(float (&to)[R][N]) {
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < N; i += LANES) store(to[r] + i, zero());
    }
}

// 8-bit weights and one scale for all inputs of a row.
struct PerToken {
    static int64_t panel_bytes(int k) { return (int64_t)k * PANEL; }
    template <int R> using Inputs = QuantizedInputs<Int8Dot, R>;

    template <int R, int P>
    static void tile(const LinearWeight& w, const uint8_t* const (&panels)[P], const Inputs<R>& x, float (&to)[R][P * PANEL]) {
        constexpr int V = P * HALVES;
        Sums sum[R][V];
        FOLO_UNROLL for (int r = 0; r < R; ++r) {
            FOLO_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = (Sums)set1i(-128 * *x.sums[r]);
        }
        add_steps<Int8Dot>(sum, Addresses<P>(panels, 0).at, Addresses<R>(x.rows, 0).at, w.k / Int8Dot::INPUTS);
        FOLO_UNROLL for (int r = 0; r < R; ++r) {
            FOLO_UNROLL for (int v = 0; v < V; ++v) store(to[r] + v * LANES, mul(to_float((I32)sum[r][v]), set1(*x.scales[r])));
        }
    }
};

// 8-bit weights and a scale for each group of a row. BLOCKS: each group of weights has one too.
template <bool BLOCKS>
struct PerGroup {
    static int64_t groups_at(int64_t g) { return g * INT8_GROUP_BYTES + (BLOCKS ? (g + 1) / 2 * INT8_SCALES_BYTES : 0); }
    static int64_t panel_bytes(int k) { return groups_at(k / GROUP); }
    template <int R> using Inputs = QuantizedInputs<Int8Dot, R>;

    template <int R, int P>
    static void tile(const LinearWeight& w, const uint8_t* const (&panels)[P], const Inputs<R>& x, float (&to)[R][P * PANEL]) {
        constexpr int V = P * HALVES;
        clear(to);
        for (int64_t g = 0; g < w.k / GROUP; ++g) {
            const int64_t start = groups_at(g) + (BLOCKS && g % 2 == 0 ? INT8_SCALES_BYTES : 0);
            Sums sum[R][V];
            FOLO_UNROLL for (int r = 0; r < R; ++r) {
                FOLO_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = (Sums)set1i(-128 * x.sums[r][g]);
            }
            const Addresses<R> inputs(x.rows, g * GROUP_STEPS * Int8Dot::INPUT_BYTES);
            add_steps<Int8Dot>(sum, Addresses<P>(panels, start).at, inputs.at, GROUP_STEPS);
            FOLO_UNROLL for (int v = 0; v < V; ++v) {
                F32 d = zero();
                if (BLOCKS) d = widen_f16(halves_at(panels[v / HALVES] + groups_at(g / 2 * 2)) + g % 2 * PANEL + v % HALVES * LANES);
                FOLO_UNROLL for (int r = 0; r < R; ++r) {
                    const F32 scale = BLOCKS ? mul(d, set1(x.scales[r][g])) : set1(x.scales[r][g]);
                    store(to[r] + v * LANES, fma(scale, to_float((I32)sum[r][v]), load(to[r] + v * LANES)));
                }
            }
        }
    }
};

// 4-bit weights in blocks with a scale and a minimum.
struct Blocks4 {
    static int64_t panel_bytes(int k) { return (int64_t)k / GROUP * INT4_BLOCK_BYTES; }
    template <int R> using Inputs = QuantizedInputs<Int4Dot, R>;

    template <int R, int P>
    static void tile(const LinearWeight& w, const uint8_t* const (&panels)[P], const Inputs<R>& x, float (&to)[R][P * PANEL]) {
        constexpr int V = P * HALVES;
        clear(to);
        for (int64_t g = 0; g < w.k / GROUP; ++g) {
            Sums sum[R][V];
            float inputs[R];                // the group's, summed
            FOLO_UNROLL for (int r = 0; r < R; ++r) {
                inputs[r] = x.scales[r][g] * (float)x.sums[r][g];
                FOLO_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Sums{};
            }
            const Addresses<P> blocks(panels, g * INT4_BLOCK_BYTES);
            add_steps<Int4Dot>(sum, blocks.at, Addresses<R>(x.rows, g * GROUP).at, INT4_GROUP_BYTES / STEP);
            FOLO_UNROLL for (int v = 0; v < V; ++v) {
                const uint16_t* scales = halves_at(blocks.at[v / HALVES] + INT4_GROUP_BYTES) + v % HALVES * LANES;
                if (R <= FEW_ROWS && v % HALVES == 0) __builtin_prefetch(blocks.at[v / HALVES] + INT4_GROUP_BYTES + PREFETCH);
                const F32 d = widen_f16(scales), m = widen_f16(scales + PANEL);
                FOLO_UNROLL for (int r = 0; r < R; ++r) {
                    const F32 minimum = fma(m, set1(inputs[r]), load(to[r] + v * LANES));
                    store(to[r] + v * LANES, fma(mul(d, set1(x.scales[r][g])), to_float(Int4Dot::total(sum[r][v])), minimum));
                }
            }
        }
    }
};

}  // namespace

void int8_per_token(Team& team, const LinearWeight& w, const LinearInput& x, LinearOutput y) { multiply<PerToken>(team, w, x, y); }
void int8_per_group(Team& team, const LinearWeight& w, const LinearInput& x, LinearOutput y) { multiply<PerGroup<false>>(team, w, x, y); }
void int8_blocks(Team& team, const LinearWeight& w, const LinearInput& x, LinearOutput y) { multiply<PerGroup<true>>(team, w, x, y); }
void int4_blocks(Team& team, const LinearWeight& w, const LinearInput& x, LinearOutput y) { multiply<Blocks4>(team, w, x, y); }

}  // namespace folo
