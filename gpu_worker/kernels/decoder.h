// A whole forward of a Llama-family decoder as one call: embedding, all layers, last norm.
//
// No Python and no dispatcher between the operators; each has a file of its own, with the
// same arithmetic at every number of rows, so a token has the same bits in a batch of one and of
// hundreds. T, float or bf16, is what rows are kept as between operators.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "linear.h"

namespace folo {

// Mirrored by decoder.py, like the other structures here.
struct Product {
    LinearWeight weight;
    Output input;                            // what it wants its rows as
};

struct DecoderLayer {
    Product qkv, output, gate_up, down;
    const void *input_norm, *mlp_norm;       // T [hidden]
    const void *query_norm, *key_norm;       // T [head_dim], or null
    int32_t plan;                            // which of the step's attention plans
};

struct DecoderModel {
    const DecoderLayer* layers;
    const void* embedding;                   // [vocab, hidden], bf16 where embedding_is_bf16, else float
    const void* norm;                        // T [hidden], before the head
    const float *cosines, *sines;            // [positions, head_dim / 2]
    int32_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim;
    float eps, scale;                        // of the norms; of the dot products
    int32_t embedding_is_bf16, is_bf16;      // the second: T
};

// Nanoseconds of the calling thread, added to what stands there.
struct DecoderTimes {
    int64_t products, attention, rest;
};

struct DecoderStep {
    const KVLayer* kv;                       // [layers]
    AttentionPlan* const* plans;
    const int64_t *token_ids, *positions;    // [tokens]
    const int64_t* slots;                    // [tokens]
    void* normed;                            // T [tokens, hidden]: what the head takes
    uint8_t* scratch;                        // scratch_bytes(model, tokens), aligned to 64
    DecoderTimes* times;                     // or null
    int32_t tokens, threads;
};

int64_t scratch_bytes(const DecoderModel& model, int64_t tokens);

template <typename T> void decode(Team& team, const DecoderModel& model, const DecoderStep& step);

}  // namespace folo
