// Paged attention of one layer, and what stores the K and V that it reads: three loops.
//
//     store_kv or rope_and_store(team, …);     K and V of all tokens of the step enter the cache
//     attend(team, …);                         every token attends to what is in the cache
//
// A loop ends when all of its units are done, so nothing attends before everything is stored. T is float or bf16:
// what activations are kept as between operators; arithmetic is float. A token's result depends on
// its own tokens alone: not on its neighbours, on the cut of the work, on block ids or threads.
#pragma once

#include "attention_plan.h"
#include "team.h"

namespace folo {

// Heads of tokens wherever they lie: x[token · token_stride + head · head_stride + i].
template <typename T>
struct Heads {
    T* x;
    int64_t token_stride, head_stride;

    T* at(int64_t token, int64_t head) const { return x + token * token_stride + head * head_stride; }
};

// K and V as they are.
template <typename T>
struct StoreArguments {
    Heads<const T> keys, values;     // [tokens, num_kv_heads, head_dim]
    const int64_t* slots;            // [tokens] block · 32 + offset; negative: not stored
    int32_t tokens;
    KVLayer kv;
};

// From the fused projection: norm of each head of Q and K (where there are weights), rotary
// embedding of the halves, K and V to the cache, Q on to the attention.
template <typename T>
struct RopeStoreArguments {
    const T* qkv;                    // [tokens, (num_heads + 2 · num_kv_heads) · head_dim]
    T* queries;                      // [tokens, num_heads · head_dim]
    const T* query_norm;             // [head_dim] or null, as is
    const T* key_norm;
    float eps;
    const float* cosines;            // [positions, head_dim / 2]
    const float* sines;
    const int64_t* positions;        // [tokens]
    const int64_t* slots;            // [tokens]
    int32_t tokens, num_heads;
    KVLayer kv;
};

template <typename T>
struct AttentionArguments {
    Heads<const T> queries;          // [tokens, num_heads, head_dim]
    T* attended;                     // [padded_tokens, num_heads · head_dim]; padding becomes zeros
    int32_t tokens, padded_tokens;
    float scale;                     // of the dot products
    float softcap;                   // 0: none
    KVLayer kv;
    AttentionPlan* plan;             // of this step, and of layers of this shape and window
};

template <typename T> void store_kv(Team& team, const StoreArguments<T>& a);
template <typename T> void rope_and_store(Team& team, const RopeStoreArguments<T>& a);
template <typename T> void attend(Team& team, const AttentionArguments<T>& a);

}  // namespace folo
