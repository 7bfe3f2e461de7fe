"""From logits to one token a row.

Called by the model runner once a step.  One path a request, whatever the batch: raw logits,
then masks, bias and penalties (``logit_changes.py``), temperature, min_p, top_k and top_p
(``filters.py``), and a draw with the noise of (seed, position).  Only the rows that ask for
something pay for it: plain greedy rows cost one argmax.  Nothing is kept between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpu_worker.filters import TILE, below_top_k, draw, keep_min_p, keep_top_p
from gpu_worker.logit_changes import SamplingRows, change_logits
from gpu_worker.noise import uniforms
from protocol.steps import RowError


@dataclass(frozen=True, slots=True)
class Sampled:
    """What became of each row, on the device."""

    token_ids: Tensor      # int64 [n]; meaningless where there is an error
    errors: Tensor         # int64 [n] RowError, 0: none


def sample(logits: Tensor, rows: SamplingRows) -> Sampled:
    """``logits`` float32 [at least n, vocab_size], row r for ``rows[r]``; not changed."""
    num_rows = len(rows.req_idx)
    largest, token_ids = logits[:num_rows].max(dim=-1)       # the first of equal ones, and NaN wherever there is one
    errors = _errors(largest, allowed_none=RowError.NAN_LOGITS)
    special = np.flatnonzero(rows.changed() | ~rows.params["greedy"])
    if len(special):
        place = torch.from_numpy(special).to(logits.device)
        sampled = _sample_special(_padded_copy(logits, place), rows.take(special))
        token_ids[place] = sampled.token_ids
        errors[place] = torch.where(errors[place] == 0, sampled.errors, errors[place])
    return Sampled(token_ids, errors)


def _errors(largest: Tensor, allowed_none: RowError) -> Tensor:
    """By a row's largest logit: NaN and infinity are errors, and so is a row of nothing but -inf."""
    bad = torch.where(largest == float("-inf"), int(allowed_none), int(RowError.NAN_LOGITS))
    return torch.where(torch.isfinite(largest), 0, bad)


def _padded_copy(logits: Tensor, rows: Tensor) -> Tensor:
    """Some rows, their width padded to whole tiles with -inf."""
    vocab_size = logits.shape[1]
    if vocab_size % TILE == 0:
        return logits[rows]
    copy = logits.new_full((len(rows), -(-vocab_size // TILE) * TILE), float("-inf"))
    copy[:, :vocab_size] = logits[rows]
    return copy


def _sample_special(logits: Tensor, rows: SamplingRows) -> Sampled:
    """Rows that are changed or random; ``logits`` is used up."""
    changed = np.flatnonzero(rows.changed())
    if len(changed):
        _on_rows(logits, changed, lambda part: change_logits(part, rows.take(changed)))
    largest, token_ids = logits.max(dim=-1)
    errors = _errors(largest, allowed_none=RowError.EMPTY_MASK)
    random = np.flatnonzero(~rows.params["greedy"])
    if len(random) == len(token_ids):
        return Sampled(_sample_random(logits, largest, rows), errors)
    if len(random):
        place = torch.from_numpy(random).to(logits.device)
        token_ids[place] = _sample_random(logits[place], largest[place], rows.take(random))
    return Sampled(token_ids, errors)


def _sample_random(logits: Tensor, largest: Tensor, rows: SamplingRows) -> Tensor:
    """One draw a row; ``logits`` is used up."""
    params, device = rows.params, logits.device
    temperature = torch.from_numpy(params["temperature"].copy()).to(device)
    scaled = logits.div_(temperature[:, None])
    limited = np.flatnonzero((params["top_k"] > 0) & (params["top_k"] < scaled.shape[1]))
    if len(limited):     # compared as logits, dropped as weights: exp of -inf is five times slower
        dropped = below_top_k(_taken(scaled, limited), params["top_k"][limited])
    weights = scaled.sub_((largest / temperature)[:, None]).exp_()
    if len(limited):
        _on_rows(weights, limited, lambda part: part.masked_fill_(dropped, 0.0))
    for name, keep in (("min_p", keep_min_p), ("top_p", keep_top_p)):
        asked = np.flatnonzero(params[name] > 0.0 if name == "min_p" else params[name] < 1.0)
        if len(asked):
            bound = torch.from_numpy(params[name][asked]).to(device)
            _on_rows(weights, asked, lambda part: keep(part, bound))
    noise = uniforms(params["seed"], rows.num_tokens)
    return draw(weights, torch.from_numpy(noise).to(device))


def _on_rows(values: Tensor, which: np.ndarray, change: Callable[[Tensor], object]) -> None:
    """``change`` some rows in place; without a copy where it is all of them."""
    part = _taken(values, which)
    change(part)
    if part is not values:
        values[torch.from_numpy(which).to(values.device)] = part


def _taken(values: Tensor, which: np.ndarray) -> Tensor:
    """Some rows (ascending): ``values`` itself where it is all of them."""
    return values if len(which) == len(values) else values[torch.from_numpy(which).to(values.device)]
