// How the attention of one step is cut up: made once a step, before the threads start.
//
// A *query block* is some consecutive new tokens of one row (request); with the query heads that
// share a KV head it gives the *query rows* that are worked on together. A *segment* is 256
// absolute positions, 8 tiles of 32. A *unit* is what one thread computes at a time: a query
// block, some KV heads, and some or all segments that the block sees. The cut decides where and
// when a number is computed, never how.
//
// Few query rows wait for memory, and memory is fastest where it is read in one run: their unit
// goes from tile to tile, and at each through its heads, which lie side by side. With many the
// heads take turns, so that what one needs stays in the caches.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kv.h"

namespace folo {

constexpr int SEGMENT_TILES = 8;
constexpr int SEGMENT = SEGMENT_TILES * TILE;        // positions
constexpr int SIDE_BY_SIDE = 12;     // query rows, of all heads that a unit reads side by side. More of them, of one head, have
                                     // each tile laid out for them first: then the products take the time, and memory does not matter

// One step's rows (requests); each has its new tokens one after another.
struct AttentionBatch {
    int32_t rows;
    const int32_t* query_start;      // [rows + 1] first token of each row
    const int32_t* seq_lens;         // [rows] keys that the row's last token sees
    const int32_t* block_table;      // [rows, table_stride] blocks of the row, in order
    int64_t table_stride;
};

// What layers of one kind have in common.
struct AttentionShape {
    int32_t num_heads, num_kv_heads, head_dim;
    int32_t window;                  // positions that a query sees, its own included; 0: all before it

    int group() const { return num_heads / num_kv_heads; }
    int32_t first_seen(int32_t position) const { return window && position >= window ? position - window + 1 : 0; }
};

struct AttentionUnit {
    int32_t row;
    int32_t kv_head, last_kv_head;   // last_kv_head excluded
    int32_t token, count;            // tokens token … token + count − 1 of the step
    int32_t position;                // absolute, of the first of them
    int32_t first_segment, last_segment;             // last_segment excluded
    int32_t split;                   // the block's segments are split over several units: which SplitBlock; or −1

    int heads_at_once(int group) const {
        const int heads = last_kv_head - kv_head;
        return heads * count * group <= SIDE_BY_SIDE ? heads : 1;
    }
};

// A query block and some KV heads, whose segments several units share. Each leaves its segments' partial
// results, and whichever ends last merges them all, in ascending order.
struct SplitBlock {
    int32_t first_segment, last_segment;
    int32_t units;
    int32_t ended;                   // counts up to `units`, then is 0 again
    int64_t partials;                // floats before those of its first head's first segment
};

// The partial result of one segment (or of several, merged): softmax(scores) · V = acc / sum.
struct Partial {
    float* acc;                      // [query rows, head_dim]
    float* maximum;                  // [query rows] of the scores, in powers of two
    float* sum;                      // [query rows] of the weights, relative to the maximum

    Partial() = default;
    Partial(float* memory, int rows, int head_dim) : acc(memory), maximum(memory + (int64_t)rows * head_dim), sum(maximum + rows) {}
    static int64_t floats(int rows, int head_dim) { return ((int64_t)rows * (head_dim + 2) + 15) / 16 * 16; }
};

class AttentionPlan {
  public:
    // For `threads` threads: units, the longest first, and scratch that is large enough for them.
    // The batch's arrays are the caller's, and must live as long as the plan is used.
    void make(const AttentionBatch& batch, const AttentionShape& shape, int threads);

    AttentionBatch batch;
    AttentionShape shape;
    std::vector<AttentionUnit> units;
    std::vector<SplitBlock> splits;

    float* partials(const SplitBlock& split) { return scratch_.get() + split.partials; }
    float* thread_scratch(int thread) { return scratch_.get() + partial_floats_ + thread * thread_floats_; }

  private:
    void cut(int32_t row, int32_t token, int32_t count, int32_t position, int64_t most_cost);

    struct Free { void operator()(float* memory) const; };
    std::unique_ptr<float[], Free> scratch_;
    int64_t scratch_floats_ = 0, partial_floats_ = 0, thread_floats_ = 0;
};

// Scratch of a thread: what one head of a unit needs, with so many query rows.
struct UnitScratch {
    static constexpr int SCORE_STRIDE = SEGMENT + 16;        // not a power of two: rows would share cache sets

    float* queries;                  // [rows, head_dim], as float or bf16
    float* scores;                   // [rows, SCORE_STRIDE]
    Partial segment, total;
    float* keys;                     // one tile of K and of V, expanded
    float* values;
    float* key_factors;              // [32] by which a dot product becomes a score
    float* value_scales;             // [256], for int8

    UnitScratch() = default;
    UnitScratch(float* memory, int rows, int head_dim);
    static int64_t floats(int rows, int head_dim);
};

}  // namespace folo
