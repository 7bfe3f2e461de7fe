// The arithmetic of attention: dot products with a tile of K, weights of a row's scores, weighted
// sums of a tile of V.
//
// For each (query row, key): the dot product is summed over the dimensions ascending, and each
// output over the keys ascending, in one accumulator each. How many rows and columns are worked
// on together (as many as registers hold) is nothing but the order in which memory is read.
//
// Q, the type of queries and weights, decides the arithmetic: float, or bf16 where the CPU
// multiplies pairs of it and both activations and cache allow it. E is what K and V are read as.
#pragma once

#include <type_traits>

#include "attention_plan.h"

namespace folo {

constexpr int SCORE_STRIDE = UnitScratch::SCORE_STRIDE;
constexpr int MAX_ROWS = 6;                          // query rows worked on together
constexpr std::integral_constant<int, 0> LOWER;
constexpr std::integral_constant<int, 1> UPPER;

// Whether attention of T activations on a cache of E multiplies pairs of bf16.
template <typename T, typename E>
constexpr bool in_pairs() {
#if defined(FOLO_BF16)
    return std::is_same_v<T, bf16> && !std::is_same_v<E, float>;
#else
    return false;
#endif
}

// work(number of rows as a constant, first row) over all rows, in groups of nearly equal size.
template <typename Work>
inline void in_groups(int rows, Work work) {
    const int groups = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int i = 0, first = 0; i < groups; ++i) {
        const int count = (rows - first + groups - i - 1) / (groups - i);
        switch (count) {
            case 1: work(std::integral_constant<int, 1>(), first); break;
            case 2: work(std::integral_constant<int, 2>(), first); break;
            case 3: work(std::integral_constant<int, 3>(), first); break;
            case 4: work(std::integral_constant<int, 4>(), first); break;
            case 5: work(std::integral_constant<int, 5>(), first); break;
            default: work(std::integral_constant<int, 6>(), first);
        }
        first += count;
    }
}

// ---- Scores: queries [ROWS, dim] · one tile of K, times factors [32] → scores [ROWS, SCORE_STRIDE]. ----

template <int ROWS, typename Q, typename E>
[[gnu::noinline]] void score(const Q* queries, const E* keys, int dim, const float* factors, float* scores) {
    constexpr int VECTORS = ROWS <= 3 && TILE / LANES >= 4 ? 4 : 2;
    for (int key = 0; key < TILE; key += VECTORS * LANES) {
        F32 sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; ++r) {
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = zero();
        }
        for (int d = 0; d < dim; d += 2) {
            if constexpr (std::is_same_v<Q, bf16>) {
#if defined(FOLO_BF16)
                I32 pairs[ROWS];
                for (int r = 0; r < ROWS; ++r) pairs[r] = broadcast_pair(queries + r * dim + d);
                for (int v = 0; v < VECTORS; ++v) {
                    const I32 k = load_key_pairs(keys, d, key + v * LANES);
                    for (int r = 0; r < ROWS; ++r) sums[r][v] = dot_pairs(sums[r][v], k, pairs[r]);
                }
#endif
            } else {
                const auto add_dimension = [&](auto odd) {
                    F32 q[ROWS];
                    for (int r = 0; r < ROWS; ++r) q[r] = set1(queries[r * dim + d + odd]);
                    for (int v = 0; v < VECTORS; ++v) {
                        const F32 k = load_key<odd>(keys, d, key + v * LANES);
                        for (int r = 0; r < ROWS; ++r) sums[r][v] = fma(q[r], k, sums[r][v]);
                    }
                };
                add_dimension(LOWER);
                add_dimension(UPPER);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int v = 0; v < VECTORS; ++v) {
                store(scores + r * SCORE_STRIDE + key + v * LANES, mul(sums[r][v], load(factors + key + v * LANES)));
            }
        }
    }
}

// ---- Weights of one row: its scores begin … end − 1 of the segment → 2^(score − maximum). ----

constexpr float LOG2_E = 1.44269504088896341f;

// score → cap · tanh(score / cap), and that in powers of two.
inline void soften(float* scores, int begin, int end, float cap) {
    const F32 doubled = set1(2.0f * LOG2_E / cap), whole = set1(cap * LOG2_E), twice = set1(2.0f * cap * LOG2_E);
    for (int key = begin / LANES * LANES; key < end; key += LANES) {
        const F32 power = exp2(min(set1(100.0f), mul(load(scores + key), doubled)));
        store(scores + key, sub(whole, div(twice, add(power, set1(1.0f)))));
    }
}

// Weights stand where the scores stood, as Q; unseen keys have none, and nothing of them is used.
template <typename Q, bool SCALED>
inline void weigh(float* scores, int begin, int end, const float* value_scales, float* maximum, float* sum) {
    const int first = begin / LANES * LANES;
    const auto seen = [&](F32 x, int key, F32 otherwise) {
        return key < begin || key + LANES > end ? keep_lanes(x, begin - key, end - key, otherwise) : x;
    };
    const F32 lowest = set1(-__builtin_inff());
    F32 largest = lowest;
    for (int key = first; key < end; key += LANES) largest = max(largest, seen(load(scores + key), key, lowest));
    *maximum = max_of(largest);
    const F32 top = set1(*maximum);
    F32 total = zero();
    for (int key = first; key < end; key += LANES) {
        F32 weight = seen(exp2(sub(load(scores + key), top)), key, zero());
        total = add(total, weight);
        if (SCALED) weight = seen(mul(weight, load(value_scales + key)), key, zero());
        store_from_float(reinterpret_cast<Q*>(scores) + key, weight);
    }
    *sum = sum_of(total);
}

// ---- Sums: acc [ROWS, dim] += weights [ROWS] of keys begin … end − 1 · one tile of V. ----

template <int ROWS, int VECTORS, typename Q, typename E>
inline void add_columns(const Q* weights, const E* values, int begin, int end, int dim, int column, float* acc) {
    constexpr int STRIDE = SCORE_STRIDE * sizeof(float) / sizeof(Q);
    F32 sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = load(acc + r * dim + column + v * LANES);
    }
    if constexpr (std::is_same_v<Q, bf16>) {
#if defined(FOLO_BF16)
        const auto add_pair = [&](int key, I32 kept) {
            I32 pairs[ROWS];
            for (int r = 0; r < ROWS; ++r) pairs[r] = broadcast_pair(weights + r * STRIDE + key);
            for (int v = 0; v < VECTORS; ++v) {
                const I32 value = andi(load_value_pairs(values, key, column + v * LANES, dim), kept);
                for (int r = 0; r < ROWS; ++r) sums[r][v] = dot_pairs(sums[r][v], value, pairs[r]);
            }
        };
        const I32 both = set1i(-1), only_upper = set1i(static_cast<int32_t>(0xffff0000)), only_lower = set1i(0xffff);
        int key = begin;
        if (key % 2) add_pair(key++ - 1, only_upper);
        for (; key + 1 < end; key += 2) add_pair(key, both);
        if (key < end) add_pair(key, only_lower);
#endif
    } else {
        const auto add_key = [&](int key, auto odd) {
            F32 w[ROWS];
            for (int r = 0; r < ROWS; ++r) w[r] = set1(weights[r * STRIDE + key + odd]);
            for (int v = 0; v < VECTORS; ++v) {
                const F32 value = load_value<odd>(values, key, column + v * LANES, dim);
                for (int r = 0; r < ROWS; ++r) sums[r][v] = fma(w[r], value, sums[r][v]);
            }
        };
        int key = begin;
        if (key % 2) add_key(key++ - 1, UPPER);
        for (; key + 1 < end; key += 2) {
            add_key(key, LOWER);
            add_key(key, UPPER);
        }
        if (key < end) add_key(key, LOWER);
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) store(acc + r * dim + column + v * LANES, sums[r][v]);
    }
}

template <int ROWS, typename Q, typename E>
[[gnu::noinline]] void add_weighted(const Q* weights, const E* values, int begin, int end, int dim, float* acc) {
    constexpr int VECTORS = LANES == 16 || ROWS <= 3 ? 4 : 2;
    int column = 0;
    for (; column + VECTORS * LANES <= dim; column += VECTORS * LANES) add_columns<ROWS, VECTORS, Q>(weights, values, begin, end, dim, column, acc);
    for (; column < dim; column += LANES) add_columns<ROWS, 1, Q>(weights, values, begin, end, dim, column, acc);
}

// ---- Tiles that many rows read are first laid out as Q, in the thread's own scratch. ----

template <typename E> inline void expand_keys(const E* keys, int dim, float* to) {
    for (int d = 0; d < dim; d += 2) {
        for (int key = 0; key < TILE; key += LANES) {
            store(to + d * TILE + key, load_key<0>(keys, d, key));
            store(to + (d + 1) * TILE + key, load_key<1>(keys, d, key));
        }
    }
}

template <typename E> inline void expand_values(const E* values, int dim, float* to) {
    for (int key = 0; key < TILE; key += 2) {
        for (int column = 0; column < dim; column += LANES) {
            store(to + key * dim + column, load_value<0>(values, key, column, dim));
            store(to + (key + 1) * dim + column, load_value<1>(values, key, column, dim));
        }
    }
}

template <typename E> inline void expand_keys(const E* keys, int dim, bf16* to) {
    for (int d = 0; d < dim; d += 2) {
        for (int key = 0; key < TILE; key += LANES) store_ints(to + d * TILE + 2 * key, load_key_pairs(keys, d, key));
    }
}

template <typename E> inline void expand_values(const E* values, int dim, bf16* to) {
    for (int key = 0; key < TILE; key += 2) {
        for (int column = 0; column < dim; column += LANES) {
            store_ints(to + key * dim + 2 * column, load_value_pairs(values, key, column, dim));
        }
    }
}

}  // namespace folo
