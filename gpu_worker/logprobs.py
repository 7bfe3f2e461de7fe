"""Raw log probabilities of given tokens and of the best ones, from unchanged logits.

Called by the model runner for the rows that ask: of sampled tokens (``logprobs``) and of
prompt tokens (``prompt_logprobs``).  float32 log_softmax; ties go to the lowest id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocol.codec import f32_bytes, i32_bytes
from protocol.steps import LogprobRows

NO_ID = -1       # fills the columns that a row did not ask for


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Column 0 is the given token, columns 1 … the best ones; on the host."""

    ids: np.ndarray        # int32 [n, width]
    values: np.ndarray     # float32 [n, width]
    ranks: np.ndarray      # int32 [n] of the given token, 1 is the best


def logprobs_of(logits: Tensor, token_ids: Tensor, num_best: np.ndarray, most: int) -> Logprobs:
    """``logits`` float32 [n, vocab_size], ``token_ids`` int64 [n], ``num_best`` [n] at least 0, at most ``most``."""
    logprobs = logits.log_softmax(dim=-1)
    given = logprobs.gather(1, token_ids[:, None])
    ranks = 1 + (logprobs > given).sum(-1) + _equal_before(logprobs, given, token_ids)
    most = min(most, logits.shape[1])
    best = best_ids(logprobs, most)
    ids = torch.cat((token_ids[:, None], best), dim=1).int().cpu().numpy()
    values = torch.cat((given, logprobs.gather(1, best)), dim=1).cpu().numpy()
    unasked = np.arange(most + 1)[None, :] > num_best[:, None]
    ids[unasked], values[unasked] = NO_ID, 0.0
    return Logprobs(ids, values, ranks.int().cpu().numpy())


def best_ids(values: Tensor, count: int) -> Tensor:
    """int64 [n, count]: ids of the largest values, descending, ties by lowest id."""
    more = min(count + 1, values.shape[1])
    largest, ids = values.topk(more, dim=-1)
    tied = (largest[:, 1:] == largest[:, :-1]).any(-1).nonzero()[:, 0]
    if len(tied):       # topk orders equal values as it likes
        keys = _ordered_keys(values[tied])
        ids[tied] = keys.topk(more, dim=-1).indices
    return ids[:, :count]


def joined(parts: list[Logprobs]) -> Logprobs:
    """Rows of several parts of equal width, one after another."""
    return Logprobs(np.concatenate([part.ids for part in parts]), np.concatenate([part.values for part in parts]),
                    np.concatenate([part.ranks for part in parts]))


def spread(found: Logprobs, places: np.ndarray, num_rows: int) -> LogprobRows:
    """As rows of a result with ``num_rows`` tokens: row ``places[i]`` is ``found``'s row i."""
    width = found.ids.shape[1]
    ids, values = np.full((num_rows, width), NO_ID, np.int32), np.zeros((num_rows, width), np.float32)
    ranks = np.zeros(num_rows, np.int32)
    ids[places], values[places], ranks[places] = found.ids, found.values, found.ranks
    return LogprobRows(width, i32_bytes(ids), f32_bytes(values), i32_bytes(ranks))


def _equal_before(logprobs: Tensor, given: Tensor, token_ids: Tensor) -> Tensor:
    """int64 [n]: tokens of lower id that are exactly as probable."""
    lower = torch.arange(logprobs.shape[1], device=logprobs.device)[None, :] < token_ids[:, None]
    return ((logprobs == given) & lower).sum(-1)


def _ordered_keys(values: Tensor) -> Tensor:
    """int64 keys, all different, in the order of (value, lower id first)."""
    values = values + 0.0                                    # -0.0 and 0.0 are equal values
    bits = values.view(torch.int32).long()
    ordered = torch.where(bits < 0, -(2**31) - bits - 1, bits)
    return (ordered << 32) - torch.arange(values.shape[1], device=values.device)
