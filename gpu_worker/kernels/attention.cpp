// Paged attention of one layer, unit by unit. The contract and the shapes: attention.h, the
// arithmetic of a tile: attention_tile.h.

#include "attention.h"

#include <algorithm>
#include <cmath>

#include "attention_tile.h"

namespace folo {

namespace {

// What does not depend on the type of activations.
struct Layer {
    KVLayer kv;
    float scale, softcap;
    AttentionPlan* plan;
};

// A KV head of a unit, and the thread's scratch for it.
template <typename Q>
struct HeadRun : UnitScratch {
    int kv_head;
    Partial result{};                // where the segment at work leaves its own

    HeadRun() = default;
    HeadRun(int kv_head, float* memory, int rows, int dim) : UnitScratch(memory, rows, dim), kv_head(kv_head) {}
    Q* rows_of_queries() const { return reinterpret_cast<Q*>(queries); }
};

// One thread at work on KV heads first_head … last_head − 1 of a unit, side by side. Q: queries and weights, E: K and V.
template <typename Q, typename E>
class UnitRun {
  public:
    UnitRun(const Layer& layer, const AttentionUnit& unit, int first_head, int last_head, float* memory)
        : a(layer), u(unit), shape(layer.plan->shape), group(shape.group()), dim(shape.head_dim), rows(unit.count * group),
          num_heads(last_head - first_head) {
        for (int i = 0; i < num_heads; ++i) heads[i] = {first_head + i, memory + i * UnitScratch::floats(rows, dim), rows, dim};
    }

    template <typename T>
    void take_queries(const Heads<const T>& from) {
        each_head([&](Head& h) {
            for (int r = 0; r < rows; ++r) {
                const T* x = from.at(u.token + r / group, h.kv_head * group + r % group);
                for (int i = 0; i < dim; i += LANES) store_from_float(h.rows_of_queries() + r * dim + i, load_as_float(x + i));
            }
        });
    }

    // All segments of the unit; true if the result of its query block is complete.
    bool attend() {
        if (u.split < 0) {
            attend_segment(u.first_segment, [](Head& h) { return h.total; });
            for (int segment = u.first_segment + 1; segment < u.last_segment; ++segment) {
                attend_segment(segment, [](Head& h) { return h.segment; });
                each_head([&](Head& h) { merge(h, segment, h.segment); });
            }
            return true;
        }
        SplitBlock& split = a.plan->splits[u.split];
        for (int segment = u.first_segment; segment < u.last_segment; ++segment) {
            attend_segment(segment, [&](Head& h) { return partial(h, split, segment); });
        }
        if (__atomic_add_fetch(&split.ended, 1, __ATOMIC_ACQ_REL) < split.units) return false;
        split.ended = 0;
        for (int segment = split.first_segment; segment < split.last_segment; ++segment) {
            each_head([&](Head& h) { merge(h, segment, partial(h, split, segment)); });
        }
        return true;
    }

    template <typename T>
    void write(T* attended) {
        each_head([&](const Head& h) {
            for (int r = 0; r < rows; ++r) {
                const F32 share = set1(1.0f / h.total.sum[r]);
                const int64_t token = u.token + r / group, head = h.kv_head * group + r % group;
                T* to = attended + (token * shape.num_heads + head) * dim;
                for (int i = 0; i < dim; i += LANES) store_from_float(to + i, mul(load(h.total.acc + r * dim + i), share));
            }
        });
    }

  private:
    using Head = HeadRun<Q>;

    const Layer& a;
    const AttentionUnit& u;
    const AttentionShape& shape;
    const int group, dim, rows;      // query row = token · group + query head within the group
    const int num_heads;
    Head heads[SIDE_BY_SIDE];

    template <typename Work>
    void each_head(Work work) {
        for (int i = 0; i < num_heads; ++i) work(heads[i]);
    }

    Partial partial(const Head& h, const SplitBlock& split, int segment) const {
        const int64_t segments = split.last_segment - split.first_segment, index = (h.kv_head - u.kv_head) * segments + segment - split.first_segment;
        return {a.plan->partials(split) + index * Partial::floats(rows, dim), rows, dim};
    }

    // Positions of the segment that a token sees, from its beginning on: first … last − 1.
    struct Seen { int first, last; };
    Seen seen(int token, int segment) const {
        const int position = u.position + token, begin = segment * SEGMENT;
        return {std::max(shape.first_seen(position), begin) - begin, std::min(position + 1, begin + SEGMENT) - begin};
    }

    int64_t block(int tile) const { return a.plan->batch.block_table[u.row * a.plan->batch.table_stride + tile]; }

    // Tokens first … last − 1 of the unit see something of a tile, whole_first … whole_last − 1 all of it.
    struct Seers { int first, last, whole_first, whole_last; };
    Seers seers(int tile) const {
        const int64_t begin = tile * TILE - u.position, end = begin + TILE - 1, window = shape.window ? shape.window : INT32_MAX;
        const auto within = [&](int64_t token) { return static_cast<int>(std::clamp<int64_t>(token, 0, u.count)); };
        return {within(begin), within(end + window), within(end), within(begin + window)};
    }

    KVTile<const E> keys(int tile, int head) const { return key_tile<const E>(a.kv, block(tile), head); }
    KVTile<const E> values(int tile, int head) const { return value_tile<const E>(a.kv, block(tile), head); }

    // What is read after the values of a segment's last tile: the next segment's keys, or those of heads that take their turn.
    const E* after(int tile) const {
        const int first = heads[0].kv_head, next = first + num_heads;
        if (tile < (u.position + u.count - 1) / TILE) return keys(tile + 1, first).values;
        if (next < u.last_kv_head) return keys(shape.first_seen(u.position) / TILE, next).values;
        return values(tile, next - 1).values;
    }

    void fetch_scales(int tile) {
        if (tile > (u.position + u.count - 1) / TILE) return;
        each_head([&](const Head& h) {
            fetch<TILE>(keys(tile, h.kv_head).scales);
            fetch<TILE>(values(tile, h.kv_head).scales);
        });
    }

    // Leaves each head's result where `to(head)` says.
    template <typename To>
    void attend_segment(int segment, To to) {
        const int first_tile = std::max(segment * SEGMENT_TILES, shape.first_seen(u.position) / TILE);
        const int last_tile = std::min(segment * SEGMENT_TILES + SEGMENT_TILES - 1, (u.position + u.count - 1) / TILE);
        const int first_head = heads[0].kv_head, last_head = first_head + num_heads - 1;
        for (int tile = first_tile; tile <= last_tile; ++tile) {
            const E* after_heads = tile < last_tile ? keys(tile + 1, first_head).values : values(first_tile, first_head).values;
            if (SCALED) fetch_scales(tile + 1);
            each_head([&](Head& h) { score_tile(h, tile, h.kv_head < last_head ? keys(tile, h.kv_head + 1).values : after_heads); });
        }
        each_head([&](Head& h) {
            h.result = to(h);
            weigh_scores(h, segment);
            std::fill_n(h.result.acc, (int64_t)rows * dim, 0.0f);
        });
        for (int tile = first_tile; tile <= last_tile; ++tile) {
            const E* after_heads = tile < last_tile ? values(tile + 1, first_head).values : after(tile);
            each_head([&](Head& h) { add_tile(h, tile, h.kv_head < last_head ? values(tile, h.kv_head + 1).values : after_heads, segment); });
        }
    }

    void weigh_scores(const Head& h, int segment) {
        for (int r = 0; r < rows; ++r) {
            const Seen s = seen(r / group, segment);
            if (s.first >= s.last) continue;
            float* scores = h.scores + (int64_t)r * SCORE_STRIDE;
            if (a.softcap > 0) soften(scores, s.first, s.last, a.softcap);
            weigh<Q, SCALED>(scores, s.first, s.last, h.value_scales, h.result.maximum + r, h.result.sum + r);
        }
    }

    // work(tile as Q or E, the next one, whether to fetch that): few rows read the cache itself.
    template <typename Expand, typename Work>
    void on_tile(const E* tile, const E* next, float* memory, Expand expand, Work work) {
        if constexpr (read_in_place<Q, E>()) {
            if (rows <= SIDE_BY_SIDE) return work(tile, next, std::true_type());
        }
        if constexpr (std::is_same_v<Q, E>) {
            work(tile, next, std::false_type());
        } else {
            Q* expanded = reinterpret_cast<Q*>(memory);
            expand(tile, dim, expanded);
            work(static_cast<const Q*>(expanded), static_cast<const Q*>(expanded), std::false_type());
        }
    }

    void score_tile(const Head& h, int tile, const E* next) {
        const int place = tile % SEGMENT_TILES * TILE;
        const F32 scale = set1(a.softcap > 0 ? a.scale : a.scale * LOG2_E);
        for (int key = 0; key < TILE; key += LANES) {
            store(h.key_factors + key, SCALED ? mul(load(keys(tile, h.kv_head).scales + key), scale) : scale);
        }
        if (SCALED) std::copy_n(values(tile, h.kv_head).scales, TILE, h.value_scales + place);
        const Seers s = seers(tile);
        const auto expand = [](const E* from, int size, Q* to) { expand_keys(from, size, to); };
        on_tile(keys(tile, h.kv_head).values, next, h.keys, expand, [&](const auto* tile_keys, const auto* next_keys, auto fetched) {
            in_groups((s.last - s.first) * group, [&](auto count, int row) {
                row += s.first * group;
                score<count, fetched>(h.rows_of_queries() + row * dim, tile_keys, next_keys, dim, h.key_factors,
                                      h.scores + row * SCORE_STRIDE + place);
            });
        });
    }

    void add_tile(const Head& h, int tile, const E* next, int segment) {
        const int place = tile % SEGMENT_TILES * TILE;
        const Seers s = seers(tile);
        const auto expand = [](const E* from, int size, Q* to) { expand_values(from, size, to); };
        on_tile(values(tile, h.kv_head).values, next, h.values, expand, [&](const auto* tile_values, const auto* next_values, auto fetched) {
            const auto add = [&](int first, int last, int begin, int end) {
                in_groups((last - first) * group, [&](auto count, int row) {
                    row += first * group;
                    const Q* weights = reinterpret_cast<const Q*>(h.scores + row * SCORE_STRIDE) + place;
                    add_weighted<count, fetched>(weights, tile_values, next_values, begin, end, dim, h.result.acc + row * dim);
                });
            };
            for (int token = s.first; token < s.last; ++token) {
                if (token == s.whole_first && s.whole_first < s.whole_last) {
                    add(s.whole_first, s.whole_last, 0, TILE);
                    token = s.whole_last - 1;
                } else {
                    const Seen keys = seen(token, segment);
                    add(token, token + 1, std::max(keys.first - place, 0), std::min(keys.last - place, TILE));
                }
            }
        });
    }

    // A segment's result joins those before it; a row takes part from the first segment on that it sees.
    void merge(const Head& h, int segment, const Partial& next) {
        const Partial& total = h.total;
        for (int r = 0; r < rows; ++r) {
            const int position = u.position + r / group, first = shape.first_seen(position) / SEGMENT;
            if (segment < first || segment * SEGMENT > position) continue;
            float* acc = total.acc + r * dim;
            const float* added = next.acc + r * dim;
            if (segment == first) {
                std::copy_n(added, dim, acc);
                total.maximum[r] = next.maximum[r];
                total.sum[r] = next.sum[r];
                continue;
            }
            const F32 old_maximum = set1(total.maximum[r]), next_maximum = set1(next.maximum[r]), both = max(old_maximum, next_maximum);
            const F32 old_share = exp2(sub(old_maximum, both)), next_share = exp2(sub(next_maximum, both));
            for (int i = 0; i < dim; i += LANES) store(acc + i, fma(load(added + i), next_share, mul(load(acc + i), old_share)));
            total.sum[r] = first_of(fma(set1(next.sum[r]), next_share, mul(set1(total.sum[r]), old_share)));
            total.maximum[r] = first_of(both);
        }
    }

    static constexpr bool SCALED = std::is_same_v<E, int8_t>;
};

template <typename T, typename E>
void attend_on(Team& team, const AttentionArguments<T>& a) {
    using Q = std::conditional_t<in_pairs<T, E>(), bf16, float>;
    const Layer layer{a.kv, a.scale, a.softcap, a.plan};
    team.for_each(a.plan->units.size(), [&](int64_t i, int rank) {
        const AttentionUnit& unit = a.plan->units[i];
        const int at_once = unit.heads_at_once(layer.plan->shape.group());
        for (int head = unit.kv_head; head < unit.last_kv_head; head += at_once) {
            UnitRun<Q, E> run(layer, unit, head, head + at_once, a.plan->thread_scratch(rank));
            run.take_queries(a.queries);
            if (run.attend()) run.write(a.attended);
        }
    });
}

}  // namespace

template <typename T>
void attend(Team& team, const AttentionArguments<T>& a) {
    const int64_t width = (int64_t)a.plan->shape.num_heads * a.plan->shape.head_dim;
    std::fill(a.attended + a.tokens * width, a.attended + a.padded_tokens * width, T());
    switch (a.kv.type) {
        case KVType::float32: return attend_on<T, float>(team, a);
        case KVType::bfloat16: return attend_on<T, bf16>(team, a);
        case KVType::int8: return attend_on<T, int8_t>(team, a);
    }
}

template void attend<float>(Team&, const AttentionArguments<float>&);
template void attend<bf16>(Team&, const AttentionArguments<bf16>&);

}  // namespace folo
