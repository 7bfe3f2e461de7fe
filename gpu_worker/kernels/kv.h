// The K/V cache: how one tile (a block of 32 positions, one KV head) lies in memory.
//
// A cache is [blocks, KV heads, tile], and a tile takes 32 · head_dim elements whatever they are:
//
//            K                                V
//   float    [head_dim][32 keys]              [32 keys][head_dim]
//   bf16     [head_dim / 2][32 keys][2]       [32 keys / 2][head_dim][2]
//   int8     [head_dim][32 keys]              [32 keys][head_dim]         and a float scale for each key
//
// so that a vector of K is one dimension of LANES keys, and a vector of V one key in LANES
// columns; bf16 lies in pairs because the dot product of AVX512_BF16 takes pairs. A key is stored
// by one thread, without touching a byte of another key: its neighbours may be stored meanwhile.
// Nothing may be assumed of keys that were never stored.
#pragma once

#include "rows.h"

namespace folo {

constexpr int TILE = 32;            // positions
constexpr int MAX_HEAD_DIM = 512;

enum class KVType : int32_t { float32 = 0, bfloat16 = 1, int8 = 2 };

// K and V of one layer.
struct KVLayer {
    void* keys;                     // [blocks, num_kv_heads, 32 · head_dim]
    void* values;
    float* key_scales;              // [blocks, num_kv_heads, 32], for int8
    float* value_scales;
    KVType type;
    int32_t num_kv_heads;
    int32_t head_dim;               // a multiple of 16
};

// One tile of K or of V.
template <typename E>
struct KVTile {
    E* values;
    float* scales;                  // [32], for int8
};

template <typename E>
inline KVTile<E> key_tile(const KVLayer& kv, int64_t block, int kv_head) {
    const int64_t tile = block * kv.num_kv_heads + kv_head;
    return {static_cast<E*>(kv.keys) + tile * TILE * kv.head_dim, kv.key_scales + (kv.type == KVType::int8 ? tile * TILE : 0)};
}

template <typename E>
inline KVTile<E> value_tile(const KVLayer& kv, int64_t block, int kv_head) {
    const int64_t tile = block * kv.num_kv_heads + kv_head;
    return {static_cast<E*>(kv.values) + tile * TILE * kv.head_dim, kv.value_scales + (kv.type == KVType::int8 ? tile * TILE : 0)};
}

// ---- Store: x [dim] becomes key `key` (0 … 31) of the tile. ----

inline void store_key(KVTile<float> tile, int key, const float* x, int dim) {
    for (int d = 0; d < dim; ++d) tile.values[d * TILE + key] = x[d];
}

inline void store_value(KVTile<float> tile, int key, const float* x, int dim) {
    for (int d = 0; d < dim; d += LANES) store(tile.values + key * dim + d, load(x + d));
}

inline void store_key(KVTile<bf16> tile, int key, const float* x, int dim) {
    alignas(64) bf16 rounded[MAX_HEAD_DIM];
    for (int d = 0; d < dim; d += LANES) store_from_float(rounded + d, load(x + d));
    for (int d = 0; d < dim; d += 2) std::memcpy(tile.values + d * TILE + 2 * key, rounded + d, 2 * sizeof(bf16));
}

inline void store_value(KVTile<bf16> tile, int key, const float* x, int dim) {
    alignas(64) bf16 rounded[MAX_HEAD_DIM];
    for (int d = 0; d < dim; d += LANES) store_from_float(rounded + d, load(x + d));
    bf16* pairs = tile.values + key / 2 * 2 * dim + key % 2;
    for (int d = 0; d < dim; ++d) pairs[2 * d] = rounded[d];
}

inline void store_key(KVTile<int8_t> tile, int key, const float* x, int dim) {
    alignas(64) int8_t rounded[MAX_HEAD_DIM];
    quantize(x, dim, rounded, tile.scales + key);
    for (int d = 0; d < dim; ++d) tile.values[d * TILE + key] = rounded[d];
}

inline void store_value(KVTile<int8_t> tile, int key, const float* x, int dim) {
    quantize(x, dim, tile.values + key * dim, tile.scales + key);
}

// ---- Load a vector as floats, int8 without its scale. d and key are even: of the two dimensions
// or keys that begin there, the lower (ODD = 0) or the upper. ----

template <int ODD> inline F32 load_key(const float* tile, int d, int key) { return load(tile + (d + ODD) * TILE + key); }
template <int ODD> inline F32 load_key(const int8_t* tile, int d, int key) { return to_float(widen_s8(tile + (d + ODD) * TILE + key)); }
template <int ODD> inline F32 load_value(const float* tile, int key, int column, int dim) { return load(tile + (key + ODD) * dim + column); }
template <int ODD> inline F32 load_value(const int8_t* tile, int key, int column, int dim) {
    return to_float(widen_s8(tile + (key + ODD) * dim + column));
}

// Both at once, as they lie in a bf16 cache.
inline I32 load_key_pairs(const bf16* tile, int d, int key) { return load_ints(tile + d * TILE + 2 * key); }
inline I32 load_value_pairs(const bf16* tile, int key, int column, int dim) { return load_ints(tile + key * dim + 2 * column); }

template <int ODD>
inline F32 of_pairs(I32 pairs) {
    return ODD ? upper_half(pairs) : as_float(shift_left<16>(pairs));
}
template <int ODD> inline F32 load_key(const bf16* tile, int d, int key) { return of_pairs<ODD>(load_key_pairs(tile, d, key)); }
template <int ODD> inline F32 load_value(const bf16* tile, int key, int column, int dim) {
    return of_pairs<ODD>(load_value_pairs(tile, key, column, dim));
}

// int8 is exact in bf16.
inline I32 as_pairs(F32 lower, F32 upper) { return ori(shift_right<16>(as_int(lower)), as_int(upper)); }
inline I32 load_key_pairs(const int8_t* tile, int d, int key) { return as_pairs(load_key<0>(tile, d, key), load_key<1>(tile, d, key)); }
inline I32 load_value_pairs(const int8_t* tile, int key, int column, int dim) {
    return as_pairs(load_value<0>(tile, key, column, dim), load_value<1>(tile, key, column, dim));
}

}  // namespace folo
