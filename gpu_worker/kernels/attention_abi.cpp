// Attention's C ABI: plans by handle, and a team of its own for each call.

#include <new>

#include "attention.h"

using namespace folo;

// What `folo_attend` and `folo_rope_and_store` work on; mirrored in attention.py. Pointers to
// activations are bf16 where is_bf16, else float; strides are in elements.
struct FoloHeads {
    const void* x;
    int64_t token_stride, head_stride;
};

struct FoloAttend {
    AttentionPlan* plan;
    KVLayer kv;
    FoloHeads queries, keys, values;
    const int64_t* slots;            // [tokens]
    void* attended;                  // [padded_tokens, num_heads · head_dim]
    float scale, softcap;
    int32_t tokens, padded_tokens, is_bf16, threads;
};

struct FoloRopeStore {
    const void* qkv;
    void* queries;
    const void *query_norm, *key_norm;
    const float *cosines, *sines;
    const int64_t *positions, *slots;
    KVLayer kv;
    float eps;
    int32_t tokens, num_heads, is_bf16, threads;
};

template <typename T>
static Heads<const T> heads(const FoloHeads& from) {
    return {static_cast<const T*>(from.x), from.token_stride, from.head_stride};
}

template <typename T>
static void run_attend(const FoloAttend& f) {
    const StoreArguments<T> stored{heads<T>(f.keys), heads<T>(f.values), f.slots, f.tokens, f.kv};
    const AttentionArguments<T> attended{heads<T>(f.queries), static_cast<T*>(f.attended), f.tokens, f.padded_tokens, f.scale, f.softcap, f.kv, f.plan};
    run_team(f.threads, [&](Team& team) {
        store_kv(team, stored);
        attend(team, attended);
    });
}

template <typename T>
static void run_rope_and_store(const FoloRopeStore& f) {
    const RopeStoreArguments<T> a{static_cast<const T*>(f.qkv), static_cast<T*>(f.queries), static_cast<const T*>(f.query_norm),
                                  static_cast<const T*>(f.key_norm), f.eps, f.cosines, f.sines, f.positions, f.slots, f.tokens, f.num_heads, f.kv};
    run_team(f.threads, [&](Team& team) { rope_and_store(team, a); });
}

#pragma GCC visibility push(default)
extern "C" {

void folo_plan_new(AttentionPlan** plan) { *plan = new (std::nothrow) AttentionPlan(); }

void folo_plan_free(AttentionPlan* plan) { delete plan; }

// *ok becomes 0 where memory is short.
void folo_plan_make(AttentionPlan* plan, const AttentionBatch* batch, const AttentionShape* shape, int threads, int* ok) {
    try {
        plan->make(*batch, *shape, threads);
        *ok = 1;
    } catch (const std::bad_alloc&) {
        *ok = 0;
    }
}

void folo_attend(const FoloAttend* arguments) { (arguments->is_bf16 ? run_attend<bf16> : run_attend<float>)(*arguments); }

void folo_rope_and_store(const FoloRopeStore* arguments) {
    (arguments->is_bf16 ? run_rope_and_store<bf16> : run_rope_and_store<float>)(*arguments);
}

}
#pragma GCC visibility pop
