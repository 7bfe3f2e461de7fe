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

// Loops over registers are unrolled early: else the compiler keeps the sums in memory as well.
#define FOLO_UNROLL _Pragma("GCC unroll 8")

namespace folo {

constexpr int SCORE_STRIDE = UnitScratch::SCORE_STRIDE;

// Whether attention of T activations on a cache of E multiplies pairs of bf16.
template <typename T, typename E>
constexpr bool in_pairs() {
#if defined(FOLO_BF16)
    return std::is_same_v<T, bf16> && !std::is_same_v<E, float>;
#else
    return false;
#endif
}

// Whether K and V of type E are read as they lie in the cache where few rows read them. (Float
// activations where the CPU has pairs are rare enough to lay out every tile for them.)
template <typename Q, typename E>
constexpr bool read_in_place() {
#if defined(FOLO_BF16)
    return std::is_same_v<Q, bf16> || std::is_same_v<E, float>;
#else
    return true;
#endif
}

// work(number of rows as a constant, first row) over all rows, in groups of 6, and 4, 3, 2 or 1 at the end.
template <typename Work>
inline void in_groups(int rows, Work work) {
    int first = 0;
    const auto group = [&](auto count) {
        work(count, first);
        first += count;
    };
    while (rows - first >= 9 || rows - first == 6) group(std::integral_constant<int, 6>());
    while (rows - first >= 7 || rows - first == 4) group(std::integral_constant<int, 4>());     // 8 = 4 + 4, 7 = 4 + 3
    if (rows - first >= 3) group(std::integral_constant<int, 3>());
    if (rows - first == 2) group(std::integral_constant<int, 2>());
    if (rows - first == 1) group(std::integral_constant<int, 1>());
}

// Decode waits for memory: while a tile is worked on, its kernels ask for the next one, piece by
// piece. (All at once, the requests would hold up the loads.)
template <int ELEMENTS, typename E>
inline void fetch(const E* next) {
    for (int i = 0; i < ELEMENTS; i += 64 / static_cast<int>(sizeof(E))) __builtin_prefetch(next + i);
}

// sums[r][v] += row(r) · vector(v). Of rows and vectors, the fewer are held in registers meanwhile.
template <int ROWS, int VECTORS, typename Row, typename Vector>
inline void add_outer(F32 (&sums)[ROWS][VECTORS], Row row, Vector vector) {
    if constexpr (ROWS < VECTORS) {
        F32 held[ROWS];
        FOLO_UNROLL
        for (int r = 0; r < ROWS; ++r) held[r] = row(r);
        FOLO_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            const F32 x = vector(v);
            FOLO_UNROLL
            for (int r = 0; r < ROWS; ++r) sums[r][v] = fma(held[r], x, sums[r][v]);
        }
    } else {
        F32 held[VECTORS];
        FOLO_UNROLL
        for (int v = 0; v < VECTORS; ++v) held[v] = vector(v);
        FOLO_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const F32 x = row(r);
            FOLO_UNROLL
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(x, held[v], sums[r][v]);
        }
    }
}

// ---- Scores: queries [ROWS, dim] · one tile of K, times factors [32] → scores [ROWS, SCORE_STRIDE]. ----

template <int ROWS, bool FETCH, typename Q, typename E>
[[gnu::noinline]] void score(const Q* queries, const E* keys, const E* next, int dim, const float* factors, float* scores) {
    constexpr int VECTORS = ROWS <= 3 && TILE / LANES >= 4 ? 4 : 2;
    for (int key = 0; key < TILE; key += VECTORS * LANES) {
        F32 sums[ROWS][VECTORS];
        FOLO_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            FOLO_UNROLL
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = zero();
        }
        for (int d = 0; d < dim; d += 2) {
            if (FETCH) fetch<2 * VECTORS * LANES>(next + d * TILE + 2 * key);
            if constexpr (std::is_same_v<Q, bf16>) {
#if defined(FOLO_BF16)
                I32 pairs[ROWS];
                FOLO_UNROLL
                for (int r = 0; r < ROWS; ++r) pairs[r] = broadcast_pair(queries + r * dim + d);
                FOLO_UNROLL
                for (int v = 0; v < VECTORS; ++v) {
                    const I32 k = load_key_pairs(keys, d, key + v * LANES);
                    FOLO_UNROLL
                    for (int r = 0; r < ROWS; ++r) sums[r][v] = dot_pairs(sums[r][v], k, pairs[r]);
                }
#endif
            } else {
                add_outer(sums, [&](int r) { return set1(queries[r * dim + d]); },
                          [&](int v) { return load_key<0>(keys, d, key + v * LANES); });
                add_outer(sums, [&](int r) { return set1(queries[r * dim + d + 1]); },
                          [&](int v) { return load_key<1>(keys, d, key + v * LANES); });
            }
        }
        FOLO_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            FOLO_UNROLL
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

inline void store_as_factors(float* p, F32 x) { store(p, x); }

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
        store_as_factors(reinterpret_cast<Q*>(scores) + key, weight);
    }
    *sum = sum_of(total);
}

// ---- Sums: acc [ROWS, dim] += weights [ROWS] of keys begin … end − 1 · one tile of V. ----

template <typename Q> constexpr int WEIGHT_STRIDE = SCORE_STRIDE * sizeof(float) / sizeof(Q);

// Whole pairs of keys, VECTORS · LANES columns.
template <int ROWS, int VECTORS, bool FETCH, typename Q, typename E>
inline void add_columns(const Q* weights, const E* values, const E* next, int begin, int end, int dim, int column, float* acc) {
    F32 sums[ROWS][VECTORS];
    FOLO_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        FOLO_UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = load(acc + r * dim + column + v * LANES);
    }
    for (int key = begin; key < end; key += 2) {
        if (FETCH) fetch<2 * VECTORS * LANES>(next + key * dim + 2 * column);
        if constexpr (std::is_same_v<Q, bf16>) {
#if defined(FOLO_BF16)
            I32 pairs[ROWS];
            FOLO_UNROLL
            for (int r = 0; r < ROWS; ++r) pairs[r] = broadcast_pair(weights + r * WEIGHT_STRIDE<Q> + key);
            FOLO_UNROLL
            for (int v = 0; v < VECTORS; ++v) {
                const I32 value = load_value_pairs(values, key, column + v * LANES, dim);
                FOLO_UNROLL
                for (int r = 0; r < ROWS; ++r) sums[r][v] = dot_pairs(sums[r][v], value, pairs[r]);
            }
#endif
        } else {
            add_outer(sums, [&](int r) { return set1(weights[r * WEIGHT_STRIDE<Q> + key]); },
                      [&](int v) { return load_value<0>(values, key, column + v * LANES, dim); });
            add_outer(sums, [&](int r) { return set1(weights[r * WEIGHT_STRIDE<Q> + key + 1]); },
                      [&](int v) { return load_value<1>(values, key, column + v * LANES, dim); });
        }
    }
    FOLO_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        FOLO_UNROLL
        for (int v = 0; v < VECTORS; ++v) store(acc + r * dim + column + v * LANES, sums[r][v]);
    }
}

// One key, whose neighbour in its pair is not seen: nothing is read of that.
template <int ODD, typename Q, typename E>
[[gnu::noinline]] void add_single(const Q* weights, int rows, const E* values, int pair, int dim, float* acc) {
    for (int r = 0; r < rows; ++r, weights += WEIGHT_STRIDE<Q>, acc += dim) {
        for (int column = 0; column < dim; column += LANES) {
            F32 sum = load(acc + column);
            if constexpr (std::is_same_v<Q, bf16>) {
#if defined(FOLO_BF16)
                const I32 kept = set1i(static_cast<int32_t>(ODD ? 0xffff0000 : 0xffff));
                sum = dot_pairs(sum, andi(load_value_pairs(values, pair, column, dim), kept), andi(broadcast_pair(weights + pair), kept));
#endif
            } else {
                sum = fma(set1(weights[pair + ODD]), load_value<ODD>(values, pair, column, dim), sum);
            }
            store(acc + column, sum);
        }
    }
}

template <int ROWS, bool FETCH, typename Q, typename E>
[[gnu::noinline]] void add_weighted(const Q* weights, const E* values, const E* next, int begin, int end, int dim, float* acc) {
    constexpr int VECTORS = LANES == 16 || ROWS <= 3 ? 4 : 2, REST = LANES == 16 ? 1 : 2;     // dim is a multiple of 16
    if (begin % 2) add_single<1>(weights, ROWS, values, begin++ - 1, dim, acc);
    const int whole = end - end % 2;
    int column = begin < whole ? 0 : dim;
    for (; column + VECTORS * LANES <= dim; column += VECTORS * LANES) {
        add_columns<ROWS, VECTORS, FETCH>(weights, values, next, begin, whole, dim, column, acc);
    }
    if constexpr (REST < VECTORS) {
        for (; column < dim; column += REST * LANES) add_columns<ROWS, REST, FETCH>(weights, values, next, begin, whole, dim, column, acc);
    }
    if (whole >= begin && whole < end) add_single<0>(weights, ROWS, values, whole, dim, acc);
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
