"""Paged attention in plain torch, on any device: the fallback and the oracle of every kernel.

The contract (a row's bits depend on its own tokens alone, whatever its neighbours, chunks,
block ids, threads):
- scores and P·V are products of one tile of 32 absolute positions, fixed in N and K;
- a segment of 8 tiles has one maximum; then exp, sum and P·V tile by tile, ascending, give
  (max, sum, acc) in float32; segments merge ascending;
- masked scores and stale values are replaced, never multiplied by zero: they may be NaN;
- everything between the products is a single IEEE operation, an exp, or a sum of 32 in a row.

A value within a query block that a later query of the same request wrote is multiplied by
an exact zero where a query does not see it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpu_worker.attention import schedule
from gpu_worker.attention.interface import AttentionLayer, AttentionMetadata
from gpu_worker.attention.schedule import QUERY_BLOCK_SIZES, TILE_TOKENS, Group, Slice
from gpu_worker.kv_cache import KVCache
from gpu_worker.product_dtype import product_dtype

HIDDEN_SCORE = -1e30              # below every real score, and finite: differences of two are not NaN
SLICE_BYTES = 12 << 20            # temporaries of one slice: they should stay in the last-level cache
LEAST_PRODUCT = 16 * 16 * 16      # torch hands a batched product to oneDNN only above this many multiplications


class ReferenceAttention:
    """The backend; holds nothing between steps."""

    name = "reference"

    def begin(self, metadata: AttentionMetadata, kv: KVCache) -> _ReferenceStep:
        return _ReferenceStep(metadata, kv)


@dataclass(frozen=True, slots=True)
class _SliceTensors:
    """A slice's indices on the device."""

    plan: Slice
    block_ids: Tensor        # [num_items] cache block
    item_block: Tensor       # [num_items]
    item_segment: Tensor     # [num_items]
    segment_items: Tensor    # [num_segments * tiles]
    partial_items: Tensor    # [num_partial] items with keys that some query does not see
    hidden: Tensor           # bool [num_partial, 1, query_rows, 32]
    tail_items: Tensor       # [num_tails] items that end beyond what the row has written
    stale: Tensor            # bool [num_tails, 1, 32, 1]


@dataclass(frozen=True, slots=True)
class _GroupTensors:
    """A group's indices on the device."""

    size: int                # tokens of a query block
    num_blocks: int
    num_segments: int
    query_rows: int          # rows of a product: size * queries per KV head, padded
    tokens: Tensor           # [num_blocks * size] tokens of the query blocks, padding repeats
    real: Tensor             # [num_real] which of these are real
    real_tokens: Tensor      # [num_real] their tokens
    slices: list[_SliceTensors]
    merge_order: list[Tensor]


class _ReferenceStep:
    """One step; layers of equal shape and window share the cut of the work."""

    def __init__(self, metadata: AttentionMetadata, kv: KVCache) -> None:
        self._metadata = metadata
        self._kv = kv
        self._groups: dict[tuple[int, ...], list[_GroupTensors]] = {}
        self._store_rows: dict[int, Tensor] = {}

    def attend(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._store(layer, key, value)
        output = query.new_empty(query.shape[0], layer.num_heads * layer.head_dim)
        output[self._metadata.num_tokens:] = 0
        for group in self._groups_of(layer, query.device):
            rows = _attend_group(layer, group, query, self._kv.key[layer.index], self._kv.value[layer.index])
            output.index_copy_(0, group.real_tokens, rows)
        return output

    def _store(self, layer: AttentionLayer, key: Tensor, value: Tensor) -> None:
        num_tokens, heads = self._metadata.num_tokens, layer.num_kv_heads
        rows = self._store_rows.get(heads)
        if rows is None:
            slots = self._metadata.slot_mapping[:num_tokens, None]
            head = torch.arange(heads, device=slots.device)
            rows = ((slots // TILE_TOKENS * heads + head) * TILE_TOKENS + slots % TILE_TOKENS).reshape(-1)
            self._store_rows[heads] = rows
        for cache, new in ((self._kv.key, key), (self._kv.value, value)):
            cache[layer.index].view(-1, layer.head_dim).index_copy_(0, rows, new[:num_tokens].reshape(-1, layer.head_dim).to(cache[layer.index].dtype))

    def _groups_of(self, layer: AttentionLayer, device: torch.device) -> list[_GroupTensors]:
        shape = (layer.window or 0, layer.num_heads, layer.num_kv_heads, layer.head_dim)
        if shape not in self._groups:
            meta = self._metadata
            limits = {size: _items_per_slice(layer, size) for size in QUERY_BLOCK_SIZES}
            groups = schedule.build_groups(meta.query_lens_host, meta.seq_lens_host, layer.window, limits)
            self._groups[shape] = [_to_device(group, layer, meta, device) for group in groups]
        return self._groups[shape]


def _query_rows(layer: AttentionLayer, size: int) -> int:
    """Rows of a product: a multiple of 4, and enough for the same kernel at every batch size."""
    least = LEAST_PRODUCT // (TILE_TOKENS * layer.head_dim) + 1
    real = size * (layer.num_heads // layer.num_kv_heads)
    return -(-max(real, least) // 4) * 4


def _items_per_slice(layer: AttentionLayer, size: int) -> int:
    rows = _query_rows(layer, size)
    cells = layer.num_kv_heads * (2 * TILE_TOKENS * layer.head_dim + rows * (3 * layer.head_dim + 2 * TILE_TOKENS))
    return max(1, SLICE_BYTES // (4 * cells))


def _to_device(group: Group, layer: AttentionLayer, meta: AttentionMetadata, device: torch.device) -> _GroupTensors:
    blocks = group.blocks
    real = np.flatnonzero(np.arange(blocks.size)[None, :] < blocks.count[:, None])
    tokens = schedule.token_indices(blocks).reshape(-1)

    def move(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return _GroupTensors(
        size=blocks.size, num_blocks=len(blocks.row), num_segments=sum(part.num_segments for part in group.slices),
        query_rows=_query_rows(layer, blocks.size), tokens=move(tokens), real=move(real), real_tokens=move(tokens[real]),
        slices=[_slice_to_device(part, group, layer, meta, move) for part in group.slices],
        merge_order=[move(order) for order in group.merge_order])


def _slice_to_device(part: Slice, group: Group, layer: AttentionLayer, meta: AttentionMetadata, move) -> _SliceTensors:
    blocks, heads_per_kv = group.blocks, layer.num_heads // layer.num_kv_heads
    row = blocks.row[part.item_block]
    first_key = part.item_tile * TILE_TOKENS
    last_pos = blocks.first_pos + blocks.count - 1
    partial = first_key + TILE_TOKENS - 1 > blocks.first_pos[part.item_block]
    if layer.window is not None:
        partial |= first_key <= last_pos[part.item_block] - layer.window
    partial_items = np.flatnonzero(partial)
    keys = first_key[partial_items, None, None] + np.arange(TILE_TOKENS)              # [partial, 1, 32]
    positions = schedule.token_positions(blocks)[part.item_block[partial_items]][:, :, None]
    hidden = keys > positions                                                         # [partial, size, 32]
    if layer.window is not None:
        hidden |= keys <= positions - layer.window
    rows = np.zeros((len(partial_items), 1, _query_rows(layer, blocks.size), TILE_TOKENS), dtype=bool)
    rows[:, 0, :blocks.size * heads_per_kv] = np.repeat(hidden, heads_per_kv, axis=1)
    written = meta.seq_lens_host[row] - first_key                                     # keys of the item's tile
    tail_items = np.flatnonzero(written < TILE_TOKENS)
    stale = np.arange(TILE_TOKENS)[None, :] >= written[tail_items, None]
    return _SliceTensors(
        plan=part, block_ids=meta.block_table[move(row), move(part.item_tile)], item_block=move(part.item_block),
        item_segment=move(part.item_segment), segment_items=move(part.segment_items.reshape(-1)),
        partial_items=move(partial_items), hidden=move(rows),
        tail_items=move(tail_items), stale=move(stale[:, None, :, None]))


def _attend_group(layer: AttentionLayer, group: _GroupTensors, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[num_real, num_heads * head_dim]: the output of the group's real tokens."""
    kv_heads, dim = layer.num_kv_heads, layer.head_dim
    heads_per_kv = layer.num_heads // kv_heads
    real_rows = group.size * heads_per_kv
    packed = query.new_zeros(group.num_blocks, kv_heads, group.query_rows, dim)
    gathered = query.index_select(0, group.tokens).view(group.num_blocks, group.size, kv_heads, heads_per_kv, dim)
    packed[:, :, :real_rows].view(group.num_blocks, kv_heads, group.size, heads_per_kv, dim).copy_(gathered.transpose(1, 2))
    maximum = torch.empty(group.num_segments, kv_heads, group.query_rows, device=query.device)
    total = torch.empty(group.num_segments, kv_heads, group.query_rows, dim + 1, device=query.device)
    for part in group.slices:
        _attend_slice(layer, part, packed, key, value, maximum, total)
    merged = _merge_segments(group, maximum, total)
    output = (merged[..., :dim] / merged[..., dim:]).to(query.dtype)[:, :, :real_rows]
    output = output.view(group.num_blocks, kv_heads, group.size, heads_per_kv, dim).transpose(1, 2)
    return output.reshape(group.num_blocks * group.size, layer.num_heads * dim).index_select(0, group.real)


def _attend_slice(layer: AttentionLayer, part: _SliceTensors, packed: Tensor, key: Tensor, value: Tensor,
                  maximum: Tensor, total: Tensor) -> None:
    """Fills ``maximum`` and ``total`` (acc, and the sum as last column) of the slice's segments."""
    plan, kv_heads, rows, dim = part.plan, layer.num_kv_heads, packed.shape[2], layer.head_dim
    num_items = len(part.block_ids)
    keys = key.index_select(0, part.block_ids).view(num_items * kv_heads, TILE_TOKENS, dim)
    queries = packed.index_select(0, part.item_block).view(num_items * kv_heads, rows, dim)
    scores = _product(queries, keys.transpose(1, 2)).float().mul_(layer.scale)
    if layer.softcap is not None:
        scores = _softcap(scores, layer.softcap)
    scores = scores.view(num_items, kv_heads, rows, TILE_TOKENS)
    scores.index_copy_(0, part.partial_items,
                       scores.index_select(0, part.partial_items).masked_fill_(part.hidden, HIDDEN_SCORE))

    segment_max = scores.amax(-1).index_select(0, part.segment_items)
    segment_max = segment_max.view(plan.num_segments, -1, kv_heads, rows).amax(1)
    end = plan.first_segment + plan.num_segments
    maximum[plan.first_segment:end] = segment_max
    # a query that sees nothing of the segment: any finite maximum makes its weights exp(-1e30) = 0
    segment_max = segment_max.masked_fill_(segment_max <= HIDDEN_SCORE, 0.0)
    weights = scores.sub_(segment_max.index_select(0, part.item_segment).unsqueeze(-1)).exp_()

    values = value.index_select(0, part.block_ids)
    values.index_copy_(0, part.tail_items, values.index_select(0, part.tail_items).masked_fill_(part.stale, 0))
    products = torch.empty(num_items, kv_heads, rows, dim + 1, device=packed.device)
    torch.sum(weights, -1, out=products[..., dim])
    weights = weights.view(num_items * kv_heads, rows, TILE_TOKENS).to(packed.dtype)
    values = values.view(num_items * kv_heads, TILE_TOKENS, dim)
    products[..., :dim] = _product(weights, values).view(num_items, kv_heads, rows, dim)
    sums = total[plan.first_segment:end].zero_()
    item = 0
    for run in plan.runs:
        sums[:run] += products[item:item + run]
        item += run


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[n, rows, k] · [n, k, columns], in an arithmetic that is fast here."""
    inside = product_dtype(a.dtype, a.device)
    return torch.bmm(a.to(inside), b.to(inside))


def _softcap(scores: Tensor, cap: float) -> Tensor:
    """cap * tanh(scores / cap), by exp: one of the functions whose bits do not depend on the place in a buffer."""
    doubled = scores.mul_(2.0 / cap).exp_()
    return doubled.add_(1.0).reciprocal_().mul_(-2.0 * cap).add_(cap)


def _merge_segments(group: _GroupTensors, maximum: Tensor, total: Tensor) -> Tensor:
    """[num_blocks, num_kv_heads, query_rows, head_dim + 1]: segments of a block put together, ascending."""
    state_max = maximum.index_select(0, group.merge_order[0])
    state = total.index_select(0, group.merge_order[0])
    for order in group.merge_order[1:]:
        count = len(order)
        next_max = maximum.index_select(0, order)
        both_max = torch.maximum(state_max[:count], next_max)
        old_share = (state_max[:count] - both_max).exp_().unsqueeze(-1)
        new_share = (next_max - both_max).exp_().unsqueeze(-1)
        state[:count].mul_(old_share).add_(total.index_select(0, order).mul_(new_share))
        state_max[:count] = both_max
    return state
