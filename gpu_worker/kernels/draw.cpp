// A random token. Theory, and the order of sums: draw.h.

#include "draw.h"

#include <cfloat>
#include <cmath>
#include <initializer_list>
#include <limits>

namespace folo {

namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// One row at work. `values` are weights of all ids (or scaled logits on the way to top_k); `kept` and `ids` a list of
// some, ascending.
struct Row {
    const float* logits;
    int32_t n, width;               // width: n in whole tiles
    float temperature, top;         // top: the largest scaled logit
    double* bins;                   // [BINS]
    double* tiles;                  // [width / DRAW_TILE], cumulative
    float* values;                  // [width]
    float* kept;                    // [width]
    int32_t* ids;                   // [width]
    int32_t count;                  // of the list
};

// −infinity beyond the last logit.
F32 logits_at(const Row& row, int i) {
    if (i + LANES <= row.n) return load(row.logits + i);
    float lanes[LANES];
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] = i + lane < row.n ? row.logits[i + lane] : LOWEST;
    return load(lanes);
}

// The largest logit, NaN where there is one; that of each block goes to `kept` [width / BLOCK].
float largest_of(const Row& row) {
    F32 all = set1(LOWEST);
    I32 highest_bits = set1i(0);     // of |x|: NaN is above infinity
    for (int begin = 0; begin < row.width; begin += BLOCK * LANES) {
        F32 most = set1(LOWEST);
        for (int i = begin; i < begin + BLOCK * LANES; i += LANES) {
            const F32 values = logits_at(row, i);
            most = max(most, values);
            highest_bits = maxi(highest_bits, andi(as_int(values), set1i(0x7fffffff)));
        }
        store(row.kept + begin / BLOCK, most);
        all = max(all, most);
    }
    return max_of(highest_bits) > 0x7f800000 ? std::numeric_limits<float>::quiet_NaN() : max_of(all);
}

// 0 where e^… is about to leave the normal numbers; 1 for the largest.
F32 weight(const Row& row, F32 scaled) {
    const F32 below = sub(scaled, set1(row.top));
    return where_at_least(below, set1(-87.0f), exp(below));
}

void weigh_all(Row& row) {
    const F32 temperature = set1(row.temperature);
    double total = 0;
    for (int begin = 0; begin < row.width; begin += DRAW_TILE) {
        F32 sum = zero();
        for (int i = begin; i < begin + DRAW_TILE; i += LANES) {
            const F32 weights = weight(row, div(logits_at(row, i), temperature));
            store(row.values + i, weights);
            sum = add(sum, weights);
        }
        row.tiles[begin / DRAW_TILE] = total += sum_of(sum);
    }
}

// Makes the list of all ids whose value is at least `bound`.
void gather(Row& row, float bound) {
    int count = 0;
    for (int i = 0; i < row.width; i += LANES) {
        for (uint32_t lanes = at_least(load(row.values + i), set1(bound)); lanes; lanes &= lanes - 1) {
            const int id = i + __builtin_ctz(lanes);
            row.ids[count] = id;
            row.kept[count++] = row.values[id];
        }
    }
    row.count = count;
}

void keep_at_least(Row& row, float bound) {
    int count = 0;
    for (int i = 0; i < row.count; ++i) {
        row.ids[count] = row.ids[i];
        row.kept[count] = row.kept[i];
        count += row.kept[i] >= bound;
    }
    row.count = count;
}

struct Cut {
    float value;
    double above;                   // the mass of what is larger
};

// The largest of `values` such that it and what is larger weigh `target`, each as much as its value, or 1; the
// smallest where all together do not. By a radix: 11, 11 and 10 bits of keys that are ordered as the values are.
Cut cut(const float* values, int count, double target, bool by_value, double* bins) {
    uint32_t decided = 0, prefix = 0;
    double above = 0;
    for (const int shift : {21, 10, 0}) {
        const uint32_t size = shift ? BINS : BINS / 2;
        for (uint32_t b = 0; b < size; ++b) bins[b] = 0;
        for (int i = 0; i < count; ++i) {
            const uint32_t bits = float_as_bits(values[i]), key = bits >> 31 ? ~bits : bits | 0x80000000;
            if ((key & decided) == prefix) bins[key >> shift & (size - 1)] += by_value ? values[i] : 1.0;
        }
        uint32_t chosen = 0;
        double above_chosen = above;
        for (uint32_t b = size; b-- > 0;) {
            if (bins[b] == 0) continue;
            chosen = b, above_chosen = above;
            above += bins[b];
            if (above >= target) break;
        }
        above = above_chosen;
        prefix |= chosen << shift;
        decided |= (size - 1) << shift;
    }
    return {bits_as_float(prefix >> 31 ? prefix & 0x7fffffff : ~prefix), above};
}

// Makes the list of the k largest, and of what equals the last of them, with their weights. The k-th largest of the
// blocks' largest ones is not above it: few others are looked at.
void keep_top_k(Row& row, int k) {
    float bound = -FLT_MAX;
    if (k <= row.width / BLOCK) bound = std::fmax(bound, cut(row.kept, row.width / BLOCK, k, false, row.bins).value / row.temperature);
    for (int i = 0; i < row.width; i += LANES) store(row.values + i, div(logits_at(row, i), set1(row.temperature)));
    gather(row, bound);
    if (row.count > k) keep_at_least(row, cut(row.kept, row.count, k, false, row.bins).value);
    for (int i = 0; i < row.count; i += LANES) store(row.kept + i, weight(row, load(row.kept + i)));
}

double total_of(const Row& row) {
    double total = 0;
    for (int i = 0; i < row.count; ++i) total += row.kept[i];
    return total;
}

void keep_top_p(Row& row, double target) {
    const Cut least = cut(row.kept, row.count, target, true, row.bins);
    double share = least.above;
    int count = 0;
    for (int i = 0; i < row.count; ++i) {
        const float value = row.kept[i];
        row.ids[count] = row.ids[i];
        row.kept[count] = value;
        count += value > least.value || (value == least.value && share < target);
        if (value == least.value) share += value;
    }
    row.count = count;
}

// The first of the list whose cumulative weight exceeds its share, or the last; −1 for an empty list.
int64_t drawn_of_list(const Row& row, double noise) {
    const double target = noise * total_of(row);
    double sum = 0;
    for (int i = 0; i < row.count; ++i) {
        sum += row.kept[i];
        if (sum > target) return row.ids[i];
    }
    return row.count ? row.ids[row.count - 1] : -1;
}

// The same of all ids.
int64_t drawn_of_all(const Row& row, double noise) {
    const double target = noise * row.tiles[row.width / DRAW_TILE - 1];
    double start = 0;
    int tile = -1;
    for (int t = 0; t < row.width / DRAW_TILE && (tile < 0 || row.tiles[tile] <= target); ++t) {
        const double before = t ? row.tiles[t - 1] : 0.0;
        if (row.tiles[t] > before) tile = t, start = before;
    }
    int64_t last = -1;
    for (int i = 0; tile >= 0 && i < DRAW_TILE; ++i) {
        const float value = row.values[tile * DRAW_TILE + i];
        if (value == 0) continue;
        last = tile * DRAW_TILE + i;
        if ((start += value) > target) break;
    }
    return last;
}

int64_t drawn(Row& row, const Draw& asked) {
    if (asked.top_k > 0 && asked.top_k < row.n) {
        keep_top_k(row, asked.top_k);
        keep_at_least(row, std::fmax(asked.min_p, FLT_MIN));
    } else {
        weigh_all(row);
        if (asked.min_p <= 0 && asked.top_p >= 1) return drawn_of_all(row, asked.noise);
        // Where all that is lighter weighs 1 − top_p at most, top_p drops it; a millionth is left to rounding.
        const double lightest = (1 - asked.top_p - 1e-6) * row.tiles[row.width / DRAW_TILE - 1] / row.n;
        gather(row, std::fmax(asked.min_p > 0 ? asked.min_p : static_cast<float>(lightest), FLT_MIN));
    }
    if (asked.top_p < 1) {
        const bool of_all = asked.min_p <= 0 && (asked.top_k <= 0 || asked.top_k >= row.n);
        keep_top_p(row, asked.top_p * (of_all ? row.tiles[row.width / DRAW_TILE - 1] : total_of(row)));
    }
    return drawn_of_list(row, asked.noise);
}

Row row_at(const DrawArguments& a, const Draw& asked, int rank) {
    Row row{a.logits + (int64_t)asked.row * a.n, a.n, static_cast<int32_t>(draw_width(a.n)), asked.temperature};
    row.bins = reinterpret_cast<double*>(a.scratch + rank * draw_scratch_bytes(a.n));
    row.tiles = row.bins + BINS;
    row.values = reinterpret_cast<float*>(row.tiles + row.width / DRAW_TILE);
    row.kept = row.values + row.width;
    row.ids = reinterpret_cast<int32_t*>(row.kept + row.width);
    return row;
}

}  // namespace

void draw(Team& team, const DrawArguments& a) {
    team.for_each(a.count, [&](int64_t r, int rank) {
        Row row = row_at(a, a.draws[r], rank);
        const float largest = largest_of(row);
        const bool fails = !std::isfinite(largest);
        a.errors[r] = !fails ? 0 : largest < 0 ? a.empty_error : a.nan_error;
        a.token_ids[r] = 0;
        if (fails) return;
        row.top = largest / row.temperature;
        int64_t id = drawn(row, a.draws[r]);
        if (id < 0) {               // the largest is infinite once scaled: no other counts
            for (id = 0; row.logits[id] != largest;) ++id;
        }
        a.token_ids[r] = id;
    });
}

}  // namespace folo

using namespace folo;

#pragma GCC visibility push(default)
extern "C" {

void folo_draw(const float* logits, const Draw* draws, int count, int n, int nan_error, int empty_error, char* scratch,
               int64_t* token_ids, int64_t* errors, int threads) {
    const DrawArguments a{logits, draws, count, n, nan_error, empty_error, scratch, token_ids, errors};
    run_team(threads, [&](Team& team) { draw(team, a); });
}

void folo_draw_scratch_bytes(int n, int64_t* bytes) { *bytes = draw_scratch_bytes(n); }

}
#pragma GCC visibility pop
