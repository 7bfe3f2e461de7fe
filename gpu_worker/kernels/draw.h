// One random token of each row of logits: temperature, top_k, min_p, top_p and a draw.
//
// As picking.py computes it, without a sort: a row's weights are e^(logit / temperature − the largest),
// kept are those that pass every filter, and drawn is the first kept id whose cumulative weight
// exceeds noise · total. Order of sums, all of them fixed by the row alone:
//   no filter    float within a tile of 1,024 ids (by lanes), double across tiles, ascending; within the tile
//                that the draw falls into, double, ascending
//   filtered     double over the kept ids, ascending
//   top_p        its share is of the total of what top_k and min_p leave (double, ascending), or of the
//                total by tiles; reached by double sums over equal leading bits, the heaviest first, and
//                token by token (lowest id first) among equal weights
// A unit of work is a row.
#pragma once

#include "simd.h"
#include "team.h"

namespace folo {

constexpr int DRAW_TILE = 1024;          // ids
constexpr int BINS = 2048;          // of a radix
constexpr int BLOCK = 32;           // logits that share a largest one: a lane of as many vectors

// What a row asks for.
struct Draw {
    double top_p;                   // (0, 1]
    double noise;                   // [0, 1)
    float temperature;              // above 0
    float min_p;                    // [0, 1]
    int32_t top_k;                  // 0 or at least n: no limit
    int32_t row;                    // of the logits
};

inline int64_t draw_width(int64_t n) { return (n + DRAW_TILE - 1) / DRAW_TILE * DRAW_TILE; }

// Of one thread: bins and tiles in double, then weights, those kept, and their ids.
inline int64_t draw_scratch_bytes(int64_t n) { return 8 * (BINS + draw_width(n) / DRAW_TILE) + 12 * draw_width(n); }

struct DrawArguments {
    const float* logits;            // [any, n]
    const Draw* draws;              // [count]
    int32_t count, n;
    int32_t nan_error;              // the code of rows with a NaN, and of those whose largest is infinite
    int32_t empty_error;            // of rows of nothing but -infinity
    char* scratch;                  // draw_scratch_bytes(n) for each thread, on a multiple of 8 bytes
    int64_t* token_ids;             // [count]; any id where there is an error
    int64_t* errors;                // [count], 0: none
};

void draw(Team& team, const DrawArguments& a);

}  // namespace folo
