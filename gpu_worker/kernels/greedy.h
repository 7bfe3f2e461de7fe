// The most likely token of each row of logits.
//
// In two rounds: the largest logit of each segment, then each row's first place of the largest
// of all. Units of work are segments, then rows.
#pragma once

#include "simd.h"
#include "team.h"

namespace folo {

constexpr int LOGITS_SEGMENT = 2048;       // logits

inline int greedy_segments(int n) { return (n + LOGITS_SEGMENT - 1) / LOGITS_SEGMENT; }

struct GreedyArguments {
    const float* logits;            // [rows, n]
    int32_t rows, n;
    int32_t nan_error;              // the code of rows with a NaN, and of those whose largest is infinite
    int32_t empty_error;            // of rows of nothing but -infinity
    float* largest;                 // [rows, greedy_segments(n)], scratch
    int64_t* token_ids;             // [rows], the lowest id of equal ones; any id where there is an error
    int64_t* errors;                // [rows], 0: none
};

void greedy(Team& team, const GreedyArguments& a);

}  // namespace folo
