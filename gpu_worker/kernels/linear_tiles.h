// How a matrix product is cut into tiles of rows and panels, and into units of work.
//
// Used by linear.cpp and linear_integer.cpp. A kernel gives the arithmetic of one tile of R rows × P
// panels, whose sums stay in registers while the inputs go by:
//   512-bit   6 rows × 4 panels are 24 of 32 registers: 4 loads and 6 broadcasts for 24 products, so
//             the multipliers (1 or 2 products a cycle, latency 4 to 6: at least 12 chains) are the
//             limit, not the load ports. Up to 8 rows run 4 × 2 or 1 × 2: there memory is the limit,
//             and two panels read side by side keep the streams few.
//   256-bit   4 rows × 1 panel of two vectors are 8 of 16 registers, the weights' two and the inputs'
//             beside them: 8 chains, 2 products a cycle.
// A tile over the edge repeats its last row or panel and drops what that gives.
#pragma once

#include <algorithm>
#include <vector>

#include "dot.h"
#include "linear.h"

namespace folo {

constexpr int MANY_ROWS = LANES == 16 ? 6 : 4;              // in a tile
constexpr int FEW_ROWS = 4;

constexpr int panels_of(int tile_rows) { return HALVES == 2 ? 1 : tile_rows > FEW_ROWS ? 4 : 2; }

struct LinearOutput {
    void* rows;                     // [rows, n]
    bool is_bf16;                   // else float
};

void int8_per_token(Team& team, const LinearWeight& w, const LinearInput& x, LinearOutput y);
void int8_per_group(Team& team, const LinearWeight& w, const LinearInput& x, LinearOutput y);
void int8_blocks(Team& team, const LinearWeight& w, const LinearInput& x, LinearOutput y);
void int4_blocks(Team& team, const LinearWeight& w, const LinearInput& x, LinearOutput y);

// A tile's rows among the product's.
template <int R>
struct TileRows {
    int64_t at[R];
    TileRows(int row, int count) {
        for (int r = 0; r < R; ++r) at[r] = row + (r < count ? r : count - 1);
    }
};

// Their inputs as `Dot` reads them: as they stand, or widened by it.
template <typename Dot, int R, typename = void>
struct RowInputs {
    const uint8_t* rows[R];
    RowInputs(const LinearWeight& w, const LinearInput& x, const TileRows<R>& rows_of) {
        const int64_t row_bytes = (int64_t)w.k * input_bytes(x.kind);
        for (int r = 0; r < R; ++r) rows[r] = static_cast<const uint8_t*>(x.values) + rows_of.at[r] * row_bytes;
    }
};

template <typename Dot, int R>
struct RowInputs<Dot, R, std::void_t<typename Dot::Wide>> {
    const uint8_t* rows[R];
    typename Dot::Wide wide[R * MAX_WIDTH];
    RowInputs(const LinearWeight& w, const LinearInput& x, const TileRows<R>& rows_of) {
        const RowInputs<void, R> narrow(w, x, rows_of);
        for (int r = 0; r < R; ++r) {
            auto* row = wide + r * w.k;
            rows[r] = reinterpret_cast<const uint8_t*>(row);
            if (r && rows_of.at[r] == rows_of.at[r - 1]) rows[r] = rows[r - 1];
            else Dot::widen(narrow.rows[r], w.k, row);
        }
    }
};

// One panel's sums of one row: scales, bias, and into y.
template <typename T>
inline void hand_on(const LinearWeight& w, const float* sums, int64_t panel, T* row) {
    T edge[PANEL];
    const int64_t first = panel * PANEL;
    const bool whole = first + PANEL <= w.n;
    T* to = whole ? row + first : edge;
    for (int i = 0; i < PANEL; i += LANES) {
        F32 x = load(sums + i);
        if (w.scales) x = mul(x, load(w.scales + first + i));
        if (w.bias) x = add(x, load(w.bias + first + i));
        store_from_float(to + i, x);
    }
    if (!whole) std::memcpy(row + first, edge, (w.n - first) * sizeof(T));
}

template <typename Kernel, int R>
void multiply_rows(const LinearWeight& w, const LinearInput& x, LinearOutput y, int row, int count, int64_t panel, int64_t panel_end) {
    constexpr int P = panels_of(R);
    const typename Kernel::template Inputs<R> inputs(w, x, TileRows<R>(row, count));
    const int64_t bytes = Kernel::panel_bytes(w.k);
    for (; panel < panel_end; panel += P) {
        alignas(64) float sums[R][P * PANEL];
        const uint8_t* panels[P];
        for (int p = 0; p < P; ++p) panels[p] = w.panels + bytes * (panel + p < panel_end ? panel + p : panel_end - 1);
        Kernel::template tile<R, P>(w, panels, inputs, sums);
        for (int r = 0; r < count; ++r) {
            const int64_t start = (int64_t)(row + r) * w.n;
            for (int p = 0; p < P && panel + p < panel_end; ++p) {
                if (y.is_bf16) hand_on(w, sums[r] + p * PANEL, panel + p, static_cast<bf16*>(y.rows) + start);
                else hand_on(w, sums[r] + p * PANEL, panel + p, static_cast<float*>(y.rows) + start);
            }
        }
    }
}

// Units of work with few rows: runs of panels, the longest first, so that memory is read in long runs, there
// are few of them, and threads end at the same time all the same. Where each begins, and where the last ends.
inline std::vector<int64_t> panel_runs(int64_t all_panels, int threads) {
    const int64_t shares = 2 * threads, least = all_panels < 8 * threads ? 1 : 2;
    std::vector<int64_t> begins{0};
    while (begins.back() < all_panels) {
        const int64_t left = all_panels - begins.back();
        begins.push_back(begins.back() + std::min(left, std::clamp<int64_t>(left / shares / 2 * 2, least, 16)));
    }
    return begins;
}

// With many: 4 panels, which stay in the caches while the rows go by, and all rows as long as that gives enough
// units: then each weight is read from memory once.
struct Blocks {
    static constexpr int64_t PANELS = 4;
    int64_t rows, row_units = 1, count;

    Blocks(int64_t all_panels, int64_t all_rows, int threads) {
        const int64_t wanted = 12 * threads, panel_units = (all_panels + PANELS - 1) / PANELS;
        while (panel_units * row_units < wanted && all_rows >= 2 * MANY_ROWS * (row_units + 1)) ++row_units;
        rows = (all_rows + row_units - 1) / row_units;
        rows = (rows + MANY_ROWS - 1) / MANY_ROWS * MANY_ROWS;
        row_units = (all_rows + rows - 1) / rows;
        count = panel_units * row_units;
    }
};

// [row, row_end) × [panel, panel_end), tile by tile.
template <typename Kernel>
void multiply_block(const LinearWeight& w, const LinearInput& x, LinearOutput y, int row, int row_end, int64_t panel,
                    int64_t panel_end) {
    while (row < row_end) {
        const int left = row_end - row;
        const bool few = x.rows <= 2 * FEW_ROWS || left <= FEW_ROWS || left == 7 || left == 8;
        const int most = few ? FEW_ROWS : MANY_ROWS, count = left < most ? left : most;
        if (left == 1) multiply_rows<Kernel, 1>(w, x, y, row, 1, panel, panel_end);
        else if (few) multiply_rows<Kernel, FEW_ROWS>(w, x, y, row, count, panel, panel_end);
        else multiply_rows<Kernel, MANY_ROWS>(w, x, y, row, count, panel, panel_end);
        row += count;
    }
}

template <typename Kernel>
void multiply(Team& team, const LinearWeight& w, const LinearInput& x, LinearOutput y) {
    const int64_t all_panels = (w.n + PANEL - 1) / PANEL;
    if (x.rows <= 2 * FEW_ROWS) {
        const std::vector<int64_t> runs = panel_runs(all_panels, team.size);
        team.for_each(x.rows ? runs.size() - 1 : 0, [&](int64_t unit) {
            multiply_block<Kernel>(w, x, y, 0, x.rows, runs[unit], runs[unit + 1]);
        });
        return;
    }
    const Blocks blocks(all_panels, x.rows, team.size);
    team.for_each(blocks.count, [&](int64_t unit) {
        const int64_t panel = unit / blocks.row_units * Blocks::PANELS, row = unit % blocks.row_units * blocks.rows;
        const int64_t row_end = std::min<int64_t>(row + blocks.rows, x.rows), panel_end = std::min(panel + Blocks::PANELS, all_panels);
        multiply_block<Kernel>(w, x, y, row, row_end, panel, panel_end);
    });
}

}  // namespace folo
