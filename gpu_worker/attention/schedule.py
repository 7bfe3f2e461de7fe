"""How the work of one step's attention is cut up: made on the host, once a step.

Called by ``reference.py``.  A *query block* is up to 64 consecutive new tokens of one row.
A *tile* is 32 absolute key positions, a *segment* 8 tiles (256 positions, aligned), an
*item* one (query block, tile).  Items are grouped in *slices* of bounded memory, and lie
tile-major in them: first the first tile of every segment, then the second of those that
have one, ..., segments with more tiles first.  So walking a segment's tiles in ascending
order is adding contiguous runs of items.

The cut decides where a number is computed, never how: that is what keeps a row's bits
independent of its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protocol.codec import BLOCK_SIZE_TOKENS

TILE_TOKENS = BLOCK_SIZE_TOKENS
SEGMENT_TILES = 8
QUERY_BLOCK_SIZES = (1, 16, 64)     # tokens; a row of one token, a short tail, anything longer
Array = np.ndarray


@dataclass(frozen=True, slots=True)
class QueryBlocks:
    """Query blocks of one size, those with most segments first."""

    size: int              # tokens of a block, padding included
    row: Array             # [num_blocks] batch row
    first_token: Array     # [num_blocks] index among the step's tokens
    count: Array           # [num_blocks] real tokens, 1 ... size
    first_pos: Array       # [num_blocks] absolute position of the first token
    first_tile: Array      # [num_blocks] first and last tile that any of its tokens sees
    last_tile: Array


@dataclass(frozen=True, slots=True)
class Slice:
    """Some segments that are worked on at once."""

    first_segment: int     # its segments are this one and the next num_segments - 1
    num_segments: int
    runs: list[int]        # segments that have a j-th tile: items of run j
    item_block: Array      # [num_items] query block
    item_segment: Array    # [num_items] segment within the slice
    item_tile: Array       # [num_items] tile, absolute
    segment_items: Array   # [num_segments, len(runs)] items of a segment, its first one where it has no more


@dataclass(frozen=True, slots=True)
class Group:
    """All work of the query blocks of one size."""

    blocks: QueryBlocks
    slices: list[Slice]
    merge_order: list[Array]   # k-th: the k-th segment of each block that has one, as segment numbers


def build_groups(query_lens: Array, seq_lens: Array, window: int | None, items_per_slice: dict[int, int]) -> list[Group]:
    """The work of a step; ``items_per_slice`` by query block size."""
    groups = []
    for size in QUERY_BLOCK_SIZES:
        blocks = _cut_blocks(size, query_lens, seq_lens, window)
        if len(blocks.row):
            groups.append(_group(blocks, items_per_slice[size]))
    return groups


def token_indices(blocks: QueryBlocks) -> Array:
    """[num_blocks, size] tokens of each block; padding repeats the last real one."""
    offset = np.minimum(np.arange(blocks.size)[None, :], blocks.count[:, None] - 1)
    return blocks.first_token[:, None] + offset


def token_positions(blocks: QueryBlocks) -> Array:
    """[num_blocks, size] absolute positions, padded in the same way."""
    return token_indices(blocks) - blocks.first_token[:, None] + blocks.first_pos[:, None]


def _cut_blocks(size: int, query_lens: Array, seq_lens: Array, window: int | None) -> QueryBlocks:
    if size == 1:
        row = np.flatnonzero(query_lens == 1)
        start, count = np.zeros_like(row), np.ones_like(row)
    else:
        row, start, count = _cut_long_rows(size, query_lens)
    row_start = np.cumsum(query_lens) - query_lens
    first_pos = seq_lens[row] - query_lens[row] + start
    last_tile = (first_pos + count - 1) // TILE_TOKENS
    first_tile = np.zeros_like(last_tile) if window is None else np.maximum(first_pos - window + 1, 0) // TILE_TOKENS
    order = np.argsort(first_tile // SEGMENT_TILES - last_tile // SEGMENT_TILES, kind="stable")
    columns = (row, row_start[row] + start, count, first_pos, first_tile, last_tile)
    return QueryBlocks(size, *(column[order].astype(np.int64) for column in columns))


def _cut_long_rows(size: int, query_lens: Array) -> tuple[Array, Array, Array]:
    """Rows of more than one token: full large blocks, a last one of the smallest size that holds the rest."""
    small, large = QUERY_BLOCK_SIZES[1:]
    found = []
    for row in np.flatnonzero(query_lens > 1):
        length = int(query_lens[row])
        tail = length % large
        cut = length - tail if 0 < tail <= small else length
        starts = range(0, cut, large) if size == large else range(cut, length, small)
        found += [(row, start, min(size, length - start)) for start in starts]
    columns = np.array(found, dtype=np.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def _group(blocks: QueryBlocks, items_per_slice: int) -> Group:
    first_segment = blocks.first_tile // SEGMENT_TILES
    segments_of_block = blocks.last_tile // SEGMENT_TILES - first_segment + 1
    block = np.repeat(np.arange(len(blocks.row)), segments_of_block)
    begin = np.cumsum(segments_of_block) - segments_of_block
    number = first_segment[block] + np.arange(len(block)) - begin[block]
    first = np.maximum(blocks.first_tile[block], number * SEGMENT_TILES)
    last = np.minimum(blocks.last_tile[block], number * SEGMENT_TILES + SEGMENT_TILES - 1)
    num_tiles = last - first + 1
    order = np.argsort(-num_tiles, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    merge_order = [place[begin[segments_of_block > k] + k] for k in range(int(segments_of_block[0]))]
    return Group(blocks, _cut_slices(block[order], first[order], num_tiles[order], items_per_slice), merge_order)


def _cut_slices(block: Array, first_tile: Array, num_tiles: Array, items_per_slice: int) -> list[Slice]:
    """Whole segments, together at most ``items_per_slice`` items, but at least one segment."""
    slices, begin, ends = [], 0, np.cumsum(num_tiles)
    while begin < len(block):
        done = ends[begin] - num_tiles[begin]
        end = max(begin + 1, int(np.searchsorted(ends, done + items_per_slice, side="right")))
        slices.append(_slice(begin, block[begin:end], first_tile[begin:end], num_tiles[begin:end]))
        begin = end
    return slices


def _slice(begin: int, block: Array, first_tile: Array, num_tiles: Array) -> Slice:
    tile = np.arange(num_tiles[0])
    exists = num_tiles[None, :] > tile[:, None]                     # [tiles, segments]
    tile_of_item, segment_of_item = np.nonzero(exists)              # tile-major
    runs = exists.sum(axis=1)
    item = (np.cumsum(runs) - runs)[None, :] + np.arange(len(block))[:, None]
    return Slice(
        first_segment=begin, num_segments=len(block), runs=runs.tolist(),
        item_block=block[segment_of_item], item_segment=segment_of_item,
        item_tile=first_tile[segment_of_item] + tile_of_item,
        segment_items=np.where(exists.T, item, np.arange(len(block))[:, None]))
