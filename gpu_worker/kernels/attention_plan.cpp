// Cutting up a step's attention. Terms and shapes: attention_plan.h.

#include "attention_plan.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace folo {

namespace {

constexpr int BLOCK_ROWS = 64;                       // query rows of a block, about: their queries stay in L1
constexpr int BLOCK_TOKENS = TILE;                   // at most
constexpr int UNITS_OF_A_THREAD = 8;                 // at least, where there is as much to share
constexpr int64_t MOST_PARTIALS = 32 << 20;          // floats; a block whose partial results find no room is not split
constexpr int64_t ALIGNMENT = 64;                    // bytes

int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// A power of two, so that blocks that begin at its multiples cross few tiles.
int block_tokens(int group) {
    int tokens = BLOCK_TOKENS;
    while (tokens > 1 && tokens * group > BLOCK_ROWS) tokens /= 2;
    return tokens;
}

// block(row, token, count, position) for each query block of the batch.
template <typename Block>
void each_block(const AttentionBatch& batch, int most_tokens, Block block) {
    for (int32_t row = 0; row < batch.rows; ++row) {
        const int32_t end = batch.query_start[row + 1];
        int32_t position = batch.seq_lens[row] - (end - batch.query_start[row]);
        for (int32_t token = batch.query_start[row], count; token < end; token += count, position += count) {
            count = std::min(end - token, most_tokens - position % most_tokens);
            block(row, token, count, position);
        }
    }
}

int64_t tiles_seen(const AttentionShape& shape, int32_t position, int32_t count) {
    return (position + count - 1) / TILE - shape.first_seen(position) / TILE + 1;
}

// Time that a tile takes: with its loads, which a single token pays for too.
int64_t cost(int64_t tiles, int32_t count) { return tiles * (count + 1); }

}  // namespace

void AttentionPlan::Free::operator()(float* memory) const { std::free(memory); }

void AttentionPlan::make(const AttentionBatch& given, const AttentionShape& kind, int threads) {
    batch = given;
    shape = kind;
    units.clear();
    splits.clear();
    partial_floats_ = 0;
    const int most_tokens = block_tokens(shape.group());
    int64_t total = 0;
    each_block(batch, most_tokens, [&](int32_t, int32_t, int32_t count, int32_t position) {
        total += cost(tiles_seen(shape, position, count), count) * shape.num_kv_heads;
    });
    const int64_t most_cost = threads == 1 ? total : total / (threads * UNITS_OF_A_THREAD) + 1;
    each_block(batch, most_tokens, [&](int32_t row, int32_t token, int32_t count, int32_t position) {
        cut(row, token, count, position, most_cost);
    });
    const auto cost_of = [&](const AttentionUnit& u) {
        const int64_t tiles = std::min<int64_t>((u.last_segment - u.first_segment) * SEGMENT_TILES, tiles_seen(shape, u.position, u.count));
        return cost(tiles, u.count) * (u.last_kv_head - u.kv_head);
    };
    std::stable_sort(units.begin(), units.end(), [&](const AttentionUnit& a, const AttentionUnit& b) { return cost_of(a) > cost_of(b); });

    thread_floats_ = 0;
    for (const AttentionUnit& u : units) {
        thread_floats_ = std::max(thread_floats_, u.heads_at_once(shape.group()) * UnitScratch::floats(u.count * shape.group(), shape.head_dim));
    }
    const int64_t floats = partial_floats_ + threads * thread_floats_;
    if (floats > scratch_floats_) {
        scratch_.reset(static_cast<float*>(std::aligned_alloc(ALIGNMENT, floats * sizeof(float))));
        scratch_floats_ = scratch_ ? floats : 0;
        if (!scratch_) throw std::bad_alloc();
    }
}

// The units of one query block, each of about `most_cost` at most. Few rows share out segments first, many rows heads.
void AttentionPlan::cut(int32_t row, int32_t token, int32_t count, int32_t position, int64_t most_cost) {
    const int32_t begin = shape.first_seen(position) / SEGMENT, end = (position + count - 1) / SEGMENT + 1, segments = end - begin;
    const int64_t head_cost = cost(tiles_seen(shape, position, count), count);
    const int32_t rows = count * shape.group();
    const int64_t partials = segments * Partial::floats(rows, shape.head_dim);
    const int64_t together = std::clamp(SIDE_BY_SIDE / rows, 1, shape.num_kv_heads);        // heads
    int64_t parts = std::min<int64_t>((together * head_cost + most_cost - 1) / most_cost, segments);
    if (partial_floats_ + partials * shape.num_kv_heads > MOST_PARTIALS) parts = 1;
    const int32_t heads = std::clamp<int64_t>(most_cost * parts / head_cost, 1, rows > SIDE_BY_SIDE ? shape.num_kv_heads : together);
    for (int32_t head = 0; head < shape.num_kv_heads; head += heads) {
        const int32_t last_head = std::min(head + heads, shape.num_kv_heads);
        if (parts > 1) {                // then the heads lie side by side: none takes a turn of its own
            splits.push_back({begin, end, static_cast<int32_t>(parts), 0, partial_floats_});
            partial_floats_ += partials * (last_head - head);
        }
        for (int64_t part = 0; part < parts; ++part) {
            units.push_back({row, head, last_head, token, count, position,
                             static_cast<int32_t>(begin + segments * part / parts), static_cast<int32_t>(begin + segments * (part + 1) / parts),
                             parts > 1 ? static_cast<int32_t>(splits.size()) - 1 : -1});
        }
    }
}

UnitScratch::UnitScratch(float* memory, int rows, int head_dim)
    : queries(memory),
      scores(queries + aligned((int64_t)rows * head_dim)),
      segment(scores + (int64_t)rows * SCORE_STRIDE, rows, head_dim),
      total(segment.acc + Partial::floats(rows, head_dim), rows, head_dim),
      keys(total.acc + Partial::floats(rows, head_dim)),
      values(keys + TILE * head_dim),
      key_factors(values + TILE * head_dim),
      value_scales(key_factors + TILE) {}

int64_t UnitScratch::floats(int rows, int head_dim) {
    return aligned((int64_t)rows * head_dim) + (int64_t)rows * SCORE_STRIDE + 2 * Partial::floats(rows, head_dim) + 2 * TILE * head_dim +
           TILE + SEGMENT;
}

}  // namespace folo
