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
FIRST_SORTED = 256       # tokens that top_p sorts at first; all of them where these do not reach p
MOST_BY_TOPK = 512


def below_top_k(logits: Tensor, top_k: np.ndarray) -> Tensor:
    """bool [n, width]: everything below the k-th largest; ties with it are not."""
    largest = _largest(logits, int(top_k.max()))
    return logits < largest.gather(1, torch.from_numpy(top_k.astype(np.int64) - 1).to(logits.device)[:, None])


def keep_min_p(weights: Tensor, min_p: Tensor) -> None:
    """Weights below ``min_p`` (float32 [n]) times the largest, which is exactly 1, become 0, in place."""
    weights.masked_fill_(weights < min_p[:, None], 0.0)


def keep_top_p(weights: Tensor, top_p: Tensor) -> None:
    """The smallest set of most probable tokens (ties by lowest id) whose share reaches ``top_p``
    (float64 [n]) stays; the others become 0, in place."""
    width = weights.shape[1]
    target = (top_p * tile_ends(weights)[:, -1])[:, None]
    least = weights.new_empty(len(weights), 1)                       # the smallest weight that stays
    ties = torch.full_like(least, width, dtype=torch.int64)          # how many weights equal to it stay
    rows = torch.arange(len(weights), device=weights.device)
    for size in (min(FIRST_SORTED, width), width):
        largest = _largest(weights if len(rows) == len(weights) else weights[rows], size)
        count = 1 + (largest.double().cumsum(-1) < target[rows]).sum(-1, keepdim=True)     # tokens that reach it
        least[rows] = largest.gather(1, (count - 1).clamp(max=size - 1))
        following = largest.gather(1, count.clamp(max=size - 1))
        ties[rows] = torch.where(following == least[rows], count - (largest > least[rows]).sum(-1, keepdim=True), width)
        rows = rows[count[:, 0] >= size]                             # not reached, or what follows is not known
        if not len(rows):
            break
    weights.masked_fill_(weights < least, 0.0)
    tied = (ties < width).nonzero()[:, 0]
    if len(tied):
        equal = weights[tied] == least[tied]
        weights[tied] = weights[tied].masked_fill(equal & (equal.cumsum(-1) > ties[tied]), 0.0)


def _largest(values: Tensor, count: int) -> Tensor:
    """[n, count]: the largest values of each row, descending.

    Many of them on a CPU by numpy, whose sort is vectorized (of values alone: which id has
    them does not matter): 7 ms for 64 rows of 49,152 where topk takes 38.
    """
    if count <= MOST_BY_TOPK or not values.is_cpu:
        return values.topk(count, dim=-1).values
    ascending = np.sort(values.numpy(), axis=-1)
    return torch.from_numpy(ascending[:, :-count - 1:-1].copy())


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
