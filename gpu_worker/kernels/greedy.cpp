// The most likely token. Theory: greedy.h.

#include "greedy.h"

#include <cmath>
#include <limits>

namespace folo {

namespace {

// NaN where there is one.
float largest_of(const float* x, int count) {
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    F32 most = set1(LOWEST);
    I32 highest_bits = set1i(0);     // of |x|: NaN is above infinity
    int i = 0;
    for (; i + LANES <= count; i += LANES) {
        const F32 values = load(x + i);
        most = max(most, values);
        highest_bits = maxi(highest_bits, andi(as_int(values), set1i(0x7fffffff)));
    }
    float lanes[LANES], largest = LOWEST;
    store(lanes, most);
    bool is_nan = max_of(highest_bits) > 0x7f800000;
    for (const float lane : lanes) largest = lane > largest ? lane : largest;
    for (; i < count; ++i) {
        is_nan |= std::isnan(x[i]);
        largest = x[i] > largest ? x[i] : largest;
    }
    return is_nan ? std::numeric_limits<float>::quiet_NaN() : largest;
}

}  // namespace

void greedy(Team& team, const GreedyArguments& a) {
    const int segments = greedy_segments(a.n);
    team.for_each((int64_t)a.rows * segments, [&](int64_t unit) {
        const int start = unit % segments * LOGITS_SEGMENT;
        a.largest[unit] = largest_of(a.logits + unit / segments * a.n + start, start + LOGITS_SEGMENT < a.n ? LOGITS_SEGMENT : a.n - start);
    });
    team.for_each(a.rows, [&](int64_t r) {
        const float* largest = a.largest + r * segments;
        int best = 0;
        for (int s = 1; s < segments && !std::isnan(largest[best]); ++s) {
            if (largest[s] > largest[best] || std::isnan(largest[s])) best = s;
        }
        const bool fails = !std::isfinite(largest[best]);
        a.errors[r] = !fails ? 0 : largest[best] < 0 ? a.empty_error : a.nan_error;
        int64_t id = fails ? 0 : (int64_t)best * LOGITS_SEGMENT;
        if (!fails) {
            while (a.logits[r * a.n + id] != largest[best]) ++id;
        }
        a.token_ids[r] = id;
    });
}

}  // namespace folo

using namespace folo;

#pragma GCC visibility push(default)
extern "C" {

void folo_greedy(const float* logits, int rows, int n, int nan_error, int empty_error, float* largest, int64_t* token_ids, int64_t* errors, int threads) {
    const GreedyArguments a{logits, rows, n, nan_error, empty_error, largest, token_ids, errors};
    run_team(threads, [&](Team& team) { greedy(team, a); });
}

}
#pragma GCC visibility pop
