"""Which tokens a random row may still take, and the draw among them.

Called by ``sampler.py`` with *weights*: exp(logit / temperature - the row's largest), 0 for
what is not kept, [n, width] with width a multiple of TILE.  Sums follow one written order
(float32 within a tile of 1,024 ids, float64 across tiles; float64 in sorted order for top_p),
so a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TILE = 1024
FIRST_SORTED = 256       # tokens that top_p sorts at first; 8 times as many where they do not reach p


def keep_top_k(logits: Tensor, top_k: np.ndarray) -> None:
    """Everything below the k-th largest becomes -inf, in place; ties with it stay."""
    largest = logits.topk(int(top_k.max()), dim=-1).values
    least = largest.gather(1, torch.from_numpy(top_k.astype(np.int64) - 1).to(logits.device)[:, None])
    logits.masked_fill_(logits < least, float("-inf"))


def keep_min_p(weights: Tensor, min_p: Tensor) -> None:
    """Weights below ``min_p`` (float32 [n]) times the largest, which is exactly 1, become 0, in place."""
    weights.masked_fill_(weights < min_p[:, None], 0.0)


def keep_top_p(weights: Tensor, top_p: Tensor) -> None:
    """The smallest set of most probable tokens (ties by lowest id) whose share reaches ``top_p``
    (float64 [n]) stays; the others become 0, in place."""
    target = top_p * tile_ends(weights)[:, -1]
    rows = torch.arange(len(weights), device=weights.device)
    size = FIRST_SORTED
    while len(rows):
        size = min(size, weights.shape[1])
        left = _cut(weights, rows, target[rows], size)
        rows, size = rows[left], size * 8


def _cut(weights: Tensor, rows: Tensor, target: Tensor, size: int) -> Tensor:
    """Cuts those of ``rows`` whose ``size`` largest weights suffice; bool [rows]: those left over."""
    of_rows = weights if len(rows) == len(weights) else weights[rows]
    largest = of_rows.topk(size, dim=-1).values
    before = (largest.double().cumsum(-1) < target[:, None]).sum(-1)       # tokens that do not reach it
    whole = size == weights.shape[1]
    left = torch.zeros_like(before, dtype=torch.bool) if whole else before >= size - 1
    least = largest.gather(1, before.clamp(max=size - 1)[:, None])
    following = largest.gather(1, (before + 1).clamp(max=size - 1)[:, None])
    cut = of_rows.masked_fill(of_rows < least, 0.0)
    tied = ((following == least)[:, 0] & ~left & (before + 1 < size)).nonzero()[:, 0]
    if len(tied):
        allowed = before[tied] + 1 - (largest[tied] > least[tied]).sum(-1)
        equal = cut[tied] == least[tied]
        cut[tied] = cut[tied].masked_fill(equal & (equal.cumsum(-1) > allowed[:, None]), 0.0)
    done = ~left
    weights[rows[done]] = cut[done]
    return left


def tile_ends(weights: Tensor) -> Tensor:
    """float64 [n, tiles]: the sum of all weights up to the end of each tile."""
    return weights.view(len(weights), -1, TILE).sum(-1).double().cumsum(-1)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """int64 [n]: the first id whose cumulative weight exceeds ``uniforms`` (float64 [n]) times
    the whole, or the last id of any weight where rounding leaves none."""
    ends = tile_ends(weights)
    target = (uniforms * ends[:, -1])[:, None]
    last_tile = _last_true(ends.diff(dim=-1, prepend=torch.zeros_like(ends[:, :1])) > 0)
    tile = torch.minimum((ends <= target).sum(-1, keepdim=True), last_tile)
    start = torch.where(tile > 0, ends.gather(1, (tile - 1).clamp(min=0)), 0.0)
    inside = weights.view(len(weights), -1, TILE).gather(1, tile[:, :, None].expand(-1, 1, TILE))[:, 0]
    exceeds = (start + inside.cumsum(-1).double() > target) & (inside > 0)
    first = exceeds.to(torch.uint8).argmax(-1, keepdim=True)
    place = torch.where(exceeds.any(-1, keepdim=True), first, _last_true(inside > 0))
    return (tile * TILE + place)[:, 0]


def _last_true(flags: Tensor) -> Tensor:
    """int64 [n, 1]: the last true column of each row."""
    return flags.shape[1] - 1 - flags.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
