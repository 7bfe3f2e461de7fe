// The forward: decoder.h.

#include "decoder.h"

#include <time.h>

#include <algorithm>

namespace folo {

namespace {

// Cuts the scratch into parts; with no memory at all it only measures.
class Arena {
  public:
    explicit Arena(uint8_t* base) : base_(base) {}

    template <typename Part>
    Part* take(int64_t count) {
        uint8_t* part = base_ ? base_ + used_ : nullptr;
        used_ += (count * sizeof(Part) + 63) / 64 * 64;
        return reinterpret_cast<Part*>(part);
    }

    int64_t used() const { return used_; }

  private:
    uint8_t* base_;
    int64_t used_ = 0;
};

template <typename T>
struct Scratch {
    T *hidden, *added, *normed, *qkv, *queries, *attended, *gate_up, *activated;
    QuantizedRows quantized;        // of the widest input

    Scratch(Arena& arena, const DecoderModel& m, int64_t tokens) {
        const int64_t query = int64_t(m.num_heads) * m.head_dim, key_value = int64_t(m.num_kv_heads) * m.head_dim;
        const int64_t widest = std::max({int64_t(m.hidden), query, int64_t(m.intermediate)});
        hidden = arena.take<T>(tokens * m.hidden);
        added = arena.take<T>(tokens * m.hidden);
        normed = arena.take<T>(tokens * m.hidden);
        qkv = arena.take<T>(tokens * (query + 2 * key_value));
        queries = arena.take<T>(tokens * query);
        attended = arena.take<T>(tokens * query);
        gate_up = arena.take<T>(tokens * 2 * m.intermediate);
        activated = arena.take<T>(tokens * m.intermediate);
        quantized.values = arena.take<int8_t>(tokens * widest);
        quantized.scales = arena.take<float>(tokens * widest / GROUP);
        quantized.sums = arena.take<int32_t>(tokens * widest / GROUP);
    }
};

template <typename T>
LinearInput input(Output kind, int rows, const T* x, const QuantizedRows& quantized) {
    switch (kind) {
        case Output::per_token: return {InputKind::per_token, rows, quantized.values, quantized.scales, quantized.sums};
        case Output::per_group: return {InputKind::per_group, rows, quantized.values, quantized.scales, quantized.sums};
        default: return {sizeof(T) == 2 ? InputKind::bf16 : InputKind::float32, rows, x, nullptr, nullptr};
    }
}

// Adds up where the time goes, where somebody asked.
class Laps {
  public:
    explicit Laps(DecoderTimes* times) : times_(times), began_(times ? now() : 0) {}

    // What has passed since the last lap belongs to `part`.
    void end(int64_t DecoderTimes::*part) {
        if (!times_) return;
        const int64_t ends = now();
        times_->*part += ends - began_;
        began_ = ends;
    }

  private:
    static int64_t now() {
        timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
    }

    DecoderTimes* times_;
    int64_t began_;
};

template <typename T>
class Forward {
  public:
    Forward(Team& team, const DecoderModel& model, const DecoderStep& step)
        : team_(team), m_(model), s_(step), arena_(step.scratch), x_(arena_, model, step.tokens), laps_(step.times) {}

    void run() {
        if (m_.embedding_is_bf16) embed<bf16>();
        else embed<float>();
        for (int i = 0; i < m_.num_layers; ++i) layer(i);
        norm(m_.norm, Output::rows, static_cast<T*>(s_.normed));
        laps_.end(&DecoderTimes::rest);
    }

  private:
    template <typename E>
    void embed() {
        const E* table = static_cast<const E*>(m_.embedding);
        team_.for_each(s_.tokens, [&](int64_t t) {
            const E* row = table + s_.token_ids[t] * m_.hidden;
            for (int i = 0; i < m_.hidden; i += LANES) store_from_float(x_.hidden + t * m_.hidden + i, load_as_float(row + i));
        });
    }

    // hidden += what the last product added, then its norm.
    void norm(const void* weight, Output output, T* normed) {
        add_norm(team_, NormArguments<T>{x_.hidden, added_, static_cast<const T*>(weight), m_.eps, s_.tokens, m_.hidden, output,
                                         normed, x_.quantized});
    }

    void product(const Product& p, const T* x, T* y) {
        laps_.end(&DecoderTimes::rest);
        linear<T>(team_, p.weight, input(p.input, s_.tokens, x, x_.quantized), y);
        laps_.end(&DecoderTimes::products);
    }

    void layer(int i) {
        const DecoderLayer& layer = m_.layers[i];
        norm(layer.input_norm, layer.qkv.input, x_.normed);
        product(layer.qkv, x_.normed, x_.qkv);
        attention(layer, s_.kv[i]);
        product(layer.output, x_.attended, x_.added);
        added_ = x_.added;
        norm(layer.mlp_norm, layer.gate_up.input, x_.normed);
        product(layer.gate_up, x_.normed, x_.gate_up);
        silu_multiply(team_, ActivationArguments<T>{x_.gate_up, s_.tokens, m_.intermediate, layer.down.input, x_.activated, x_.quantized});
        product(layer.down, x_.activated, x_.added);
    }

    void attention(const DecoderLayer& layer, const KVLayer& kv) {
        rope_and_store(team_, RopeStoreArguments<T>{
            x_.qkv, x_.queries, static_cast<const T*>(layer.query_norm), static_cast<const T*>(layer.key_norm), m_.eps, m_.cosines,
            m_.sines, s_.positions, s_.slots, s_.tokens, m_.num_heads, kv});
        const int64_t width = int64_t(m_.num_heads) * m_.head_dim;
        laps_.end(&DecoderTimes::rest);
        attend(team_, AttentionArguments<T>{{x_.queries, width, m_.head_dim}, x_.attended, s_.tokens, s_.tokens, m_.scale, 0.0f, kv,
                                            s_.plans[layer.plan]});
        laps_.end(&DecoderTimes::attention);
        if (layer.output.input != Output::rows) quantize_rows(team_, x_.attended, s_.tokens, width, layer.output.input, x_.quantized);
    }

    Team& team_;
    const DecoderModel& m_;
    const DecoderStep& s_;
    Arena arena_;
    Scratch<T> x_;
    Laps laps_;
    const T* added_ = nullptr;      // what the last product of the residual stream gave; nothing before the first layer
};

}  // namespace

int64_t scratch_bytes(const DecoderModel& model, int64_t tokens) {
    Arena arena(nullptr);
    if (model.is_bf16) Scratch<bf16>(arena, model, tokens);
    else Scratch<float>(arena, model, tokens);
    return arena.used();
}

template <typename T>
void decode(Team& team, const DecoderModel& model, const DecoderStep& step) {
    Forward<T>(team, model, step).run();
}

template void decode<float>(Team&, const DecoderModel&, const DecoderStep&);
template void decode<bf16>(Team&, const DecoderModel&, const DecoderStep&);

}  // namespace folo

using namespace folo;

#pragma GCC visibility push(default)
extern "C" {

void folo_decoder_scratch_bytes(const DecoderModel* model, int tokens, int64_t* bytes) { *bytes = scratch_bytes(*model, tokens); }

void folo_decode(const DecoderModel* model, const DecoderStep* step) {
    run_team(step->threads, [&](Team& team) { (model->is_bf16 ? decode<bf16> : decode<float>)(team, *model, *step); });
}

}
#pragma GCC visibility pop
