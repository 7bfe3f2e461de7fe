"""What changes the logits of a row before temperature: masks, bias, penalties, in this order.

Called by ``sampler.py`` on a copy of the rows that ask for it.  Everything is computed from
the request's token ids, prompt length and params alone; every operation is a single IEEE one
on one value, so a row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpu_worker.request_states import ANY_TOKEN, TokenLists

FORBIDDEN = float("-inf")


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The rows that sample in a step: slices of the tables, by position among them."""

    req_idx: np.ndarray              # int64 [n]
    num_tokens: np.ndarray           # int64 [n] known; the sampled token gets this position
    prompt_len: np.ndarray           # int64 [n]
    params: np.ndarray               # PARAMS_DTYPE [n]
    lists: list[TokenLists]          # [n]
    token_ids: Tensor                # int32 [max_num_seqs, max_model_len], the whole table, on the device

    def take(self, which: np.ndarray) -> SamplingRows:
        """Some of the rows."""
        return SamplingRows(self.req_idx[which], self.num_tokens[which], self.prompt_len[which], self.params[which],
                            [self.lists[i] for i in which.tolist()], self.token_ids)

    def changed(self) -> np.ndarray:
        """bool [n]: rows whose logits this module changes."""
        return self.params["has_lists"] | self.params["penalized"] | self.waits_for_end()

    def waits_for_end(self) -> np.ndarray:
        """bool [n]: rows with fewer tokens of output than ``min_tokens``."""
        return self.num_tokens - self.prompt_len < self.params["min_tokens"]


def change_logits(logits: Tensor, rows: SamplingRows) -> None:
    """``logits`` float32 [n, width], contiguous, row r for ``rows[r]``; changed in place."""
    listed = np.flatnonzero(rows.params["has_lists"]).tolist()
    _keep_allowed(logits, rows, [i for i in listed if rows.lists[i].allowed is not None])
    _forbid_bad_words(logits, rows, [i for i in listed if len(rows.lists[i].bad_last)])
    _forbid_end(logits, rows, np.flatnonzero(rows.waits_for_end()).tolist())
    _add_bias(logits, rows, [i for i in listed if len(rows.lists[i].bias_ids)])
    penalized = np.flatnonzero(rows.params["penalized"])
    if len(penalized):
        _penalize(logits, rows.take(penalized), penalized)


def _keep_allowed(logits: Tensor, rows: SamplingRows, which: list[int]) -> None:
    if not which:
        return
    cells = _cells(logits, which, [rows.lists[i].allowed for i in which])
    kept = logits.view(-1)[cells]
    logits[_index(np.array(which), logits)] = FORBIDDEN
    logits.view(-1)[cells] = kept


def _forbid_bad_words(logits: Tensor, rows: SamplingRows, which: list[int]) -> None:
    """The last token of a bad word, where the output ends with the tokens before it."""
    if not which:
        return
    longest = max(rows.lists[i].bad_prefixes.shape[1] for i in which)
    prefixes = np.concatenate([_widened(rows.lists[i].bad_prefixes, longest) for i in which])
    lengths = np.concatenate([rows.lists[i].bad_lengths for i in which])
    row = np.repeat(which, [len(rows.lists[i].bad_last) for i in which])
    fits = lengths - 1 <= (rows.num_tokens - rows.prompt_len)[row]
    tail = rows.num_tokens[row, None] - longest + np.arange(longest)           # positions [words, longest]
    place = rows.req_idx[row, None] * rows.token_ids.shape[1] + np.maximum(tail, 0)
    there = rows.token_ids.view(-1)[_index(place, logits)]
    wanted = _index(prefixes, logits)
    ends_so = ((there == wanted) | (wanted == ANY_TOKEN)).all(-1) & _index(fits, logits)
    cells = _cells(logits, which, [rows.lists[i].bad_last for i in which])[ends_so]
    logits.view(-1)[cells] = FORBIDDEN


def _forbid_end(logits: Tensor, rows: SamplingRows, which: list[int]) -> None:
    """EOS and stop ids, before ``min_tokens`` tokens of output."""
    if which:
        logits.view(-1)[_cells(logits, which, [rows.lists[i].end_ids for i in which])] = FORBIDDEN


def _add_bias(logits: Tensor, rows: SamplingRows, which: list[int]) -> None:
    if which:
        values = np.concatenate([rows.lists[i].bias_values for i in which])
        logits.view(-1).index_add_(0, _cells(logits, which, [rows.lists[i].bias_ids for i in which]), _index(values, logits))


def _penalize(logits: Tensor, rows: SamplingRows, target: np.ndarray) -> None:
    """Repetition (tokens of prompt and output), then frequency and presence (of the output).

    ``target``: the row of ``logits`` of each of ``rows``.  Only the tokens that occur are
    touched; one that occurs several times is computed and written several times alike.
    """
    flat = logits.view(-1)
    seen, owner = _tokens_of(rows, np.zeros_like(rows.num_tokens), logits)
    cells = _index(target[owner] * logits.shape[1], logits) + seen
    penalty = _index(rows.params["repetition_penalty"][owner], logits)
    before = flat[cells]
    flat[cells] = torch.where(before > 0, before / penalty, before * penalty)

    written, owner = _tokens_of(rows, rows.prompt_len, logits)
    if not len(written):
        return
    counts = torch.zeros(len(target) * logits.shape[1], dtype=torch.int32, device=logits.device)
    keys = _index(owner * logits.shape[1], logits) + written
    counts.index_add_(0, keys, torch.ones_like(keys, dtype=torch.int32))
    cells = _index(target[owner] * logits.shape[1], logits) + written
    frequency = _index(rows.params["frequency_penalty"][owner], logits)
    presence = _index(rows.params["presence_penalty"][owner], logits)
    flat[cells] = flat[cells] - frequency * counts[keys] - presence


def _tokens_of(rows: SamplingRows, begin: np.ndarray, logits: Tensor) -> tuple[Tensor, np.ndarray]:
    """(int64 ids at positions ``begin`` … ``num_tokens`` of every row, which row each is of)."""
    count = rows.num_tokens - begin
    owner = np.repeat(np.arange(len(count)), count)
    offset = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    place = rows.req_idx[owner] * rows.token_ids.shape[1] + begin[owner] + offset
    return rows.token_ids.view(-1)[_index(place, logits)].long(), owner


def _widened(prefixes: np.ndarray, width: int) -> np.ndarray:
    return np.pad(prefixes, ((0, 0), (width - prefixes.shape[1], 0)), constant_values=ANY_TOKEN)


def _cells(logits: Tensor, which: list[int], ids: list[np.ndarray]) -> Tensor:
    """Places in ``logits.view(-1)`` of the given ids of the given rows."""
    row = np.repeat(np.array(which, dtype=np.int64), [len(part) for part in ids])
    return _index(row * logits.shape[1] + np.concatenate(ids), logits)


def _index(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)
