// K and V of a step's tokens into the cache, with or without the rotary embedding. Shapes: attention.h.

#include <algorithm>
#include <cmath>

#include "attention.h"

namespace folo {

namespace {

constexpr int TOKENS_AT_ONCE = 16;   // at most: neighbours in the cache share its lines, so one thread should store them

// Units of consecutive tokens, small enough that every thread has some.
template <typename Work>
void each_token(Team& team, int tokens, Work work) {
    const int each = std::clamp(tokens / (4 * team.size), 1, TOKENS_AT_ONCE);
    team.for_each((tokens + each - 1) / each, [&](int64_t unit) {
        for (int64_t token = unit * each; token < std::min<int64_t>(tokens, (unit + 1) * each); ++token) work(token);
    });
}

template <typename E>
void store_key_of(const KVLayer& kv, int64_t slot, int head, const float* x) {
    store_key(key_tile<E>(kv, slot / TILE, head), slot % TILE, x, kv.head_dim);
}

template <typename E>
void store_value_of(const KVLayer& kv, int64_t slot, int head, const float* x) {
    store_value(value_tile<E>(kv, slot / TILE, head), slot % TILE, x, kv.head_dim);
}

// x [head_dim] as the slot's key or value of a head, whatever the cache keeps.
void keep_key(const KVLayer& kv, int64_t slot, int head, const float* x) {
    switch (kv.type) {
        case KVType::float32: return store_key_of<float>(kv, slot, head, x);
        case KVType::bfloat16: return store_key_of<bf16>(kv, slot, head, x);
        case KVType::int8: return store_key_of<int8_t>(kv, slot, head, x);
    }
}

void keep_value(const KVLayer& kv, int64_t slot, int head, const float* x) {
    switch (kv.type) {
        case KVType::float32: return store_value_of<float>(kv, slot, head, x);
        case KVType::bfloat16: return store_value_of<bf16>(kv, slot, head, x);
        case KVType::int8: return store_value_of<int8_t>(kv, slot, head, x);
    }
}

template <typename T>
void take(const T* from, int dim, float* x) {
    for (int i = 0; i < dim; i += LANES) store(x + i, load_as_float(from + i));
}

// x / rms(x) · weight, in place.
template <typename T>
void norm(float* x, int dim, const T* weight, float eps) {
    F32 squares = zero();
    for (int i = 0; i < dim; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const F32 factor = set1(1.0f / std::sqrt(sum_of(squares) / dim + eps));
    for (int i = 0; i < dim; i += LANES) store(x + i, mul(mul(load(x + i), factor), load_as_float(weight + i)));
}

// The first half of x is turned against the second, in place. (The half may end within a vector.)
void rotate(float* x, int half, const float* cosines, const float* sines) {
    int i = 0;
    for (; i + LANES <= half; i += LANES) {
        const F32 first = load(x + i), second = load(x + half + i), c = load(cosines + i), s = load(sines + i);
        store(x + i, sub(mul(first, c), mul(second, s)));
        store(x + half + i, add(mul(second, c), mul(first, s)));
    }
    for (; i < half; ++i) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cosines[i] - second * sines[i];
        x[half + i] = second * cosines[i] + first * sines[i];
    }
}

}  // namespace

template <typename T>
void store_kv(Team& team, const StoreArguments<T>& a) {
    each_token(team, a.tokens, [&](int64_t token) {
        if (a.slots[token] < 0) return;
        alignas(64) float x[MAX_HEAD_DIM];
        for (int head = 0; head < a.kv.num_kv_heads; ++head) {
            take(a.keys.at(token, head), a.kv.head_dim, x);
            keep_key(a.kv, a.slots[token], head, x);
            take(a.values.at(token, head), a.kv.head_dim, x);
            keep_value(a.kv, a.slots[token], head, x);
        }
    });
}

template <typename T>
void rope_and_store(Team& team, const RopeStoreArguments<T>& a) {
    const int dim = a.kv.head_dim, half = dim / 2, kv_heads = a.kv.num_kv_heads;
    each_token(team, a.tokens, [&](int64_t token) {
        alignas(64) float x[MAX_HEAD_DIM];
        const float *cosines = a.cosines + a.positions[token] * half, *sines = a.sines + a.positions[token] * half;
        const T* head = a.qkv + token * (a.num_heads + 2 * kv_heads) * dim;
        const auto turn = [&](const T* weight) {
            take(head, dim, x);
            if (weight) norm(x, dim, weight, a.eps);
            rotate(x, half, cosines, sines);
            head += dim;
        };
        for (int h = 0; h < a.num_heads; ++h) {
            turn(a.query_norm);
            T* to = a.queries + (token * a.num_heads + h) * dim;
            for (int i = 0; i < dim; i += LANES) store_from_float(to + i, load(x + i));
        }
        if (a.slots[token] < 0) return;
        for (int h = 0; h < kv_heads; ++h) {
            turn(a.key_norm);
            keep_key(a.kv, a.slots[token], h, x);
        }
        for (int h = 0; h < kv_heads; ++h, head += dim) {
            take(head, dim, x);
            keep_value(a.kv, a.slots[token], h, x);
        }
    });
}

#define INSTANTIATE(T)                                                            \
    template void store_kv<T>(Team&, const StoreArguments<T>&);                   \
    template void rope_and_store<T>(Team&, const RopeStoreArguments<T>&);
INSTANTIATE(float)
INSTANTIATE(bf16)
#undef INSTANTIATE

}  // namespace folo
