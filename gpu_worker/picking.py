"""How a row of final logits becomes a token: the collaborator of ``sampler.py``, in plain torch.

A model brings the picker of its device, chosen once at start (``models/cpu_kernels.py``); this one
runs everywhere, and is what the others are compared with.  Rows fail alone, and what
becomes of a row does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gpu_worker.filters import TILE, below_top_k, draw, keep_min_p, keep_top_p
from protocol.steps import RowError


@dataclass(frozen=True, slots=True)
class Sampled:
    """What became of each row, on the device."""

    token_ids: Tensor      # int64 [n]; meaningless where there is an error
    errors: Tensor         # int64 [n] RowError, 0: none


class Picker(Protocol):
    """Logits float32 [rows, vocab_size], never changed, to tokens.  A row whose largest logit is NaN or infinite
    has the error NAN_LOGITS, one of nothing but -inf ``empty``."""

    name: str               # equal names give equal tokens

    def largest(self, logits: Tensor, empty: RowError) -> Sampled:
        """The lowest id of each row's largest logit."""
        ...

    def random(self, logits: Tensor, which: np.ndarray, params: np.ndarray, noise: np.ndarray, empty: RowError) -> Sampled:
        """One draw for each of the rows ``which`` (int64 [n], ascending): temperature, top_k, min_p and top_p of ``params``
        (PARAMS_DTYPE [n]), ``noise`` float64 [n] in [0, 1)."""
        ...


class TorchPicker:
    """On any device."""

    name = "torch"

    def largest(self, logits: Tensor, empty: RowError) -> Sampled:
        most, token_ids = logits.max(dim=-1)       # the first of equal ones, and NaN wherever there is one
        return Sampled(token_ids, _errors(most, empty))

    def random(self, logits: Tensor, which: np.ndarray, params: np.ndarray, noise: np.ndarray, empty: RowError) -> Sampled:
        copy = _padded_copy(logits, torch.from_numpy(which).to(logits.device))
        most = copy.amax(dim=-1)
        token_ids = draw(_weights(copy, most, params), torch.from_numpy(noise).to(logits.device))
        return Sampled(token_ids, _errors(most, empty))


def _errors(largest: Tensor, empty: RowError) -> Tensor:
    """int64 [n], by a row's largest logit."""
    bad = torch.where(largest == float("-inf"), int(empty), int(RowError.NAN_LOGITS))
    return torch.where(torch.isfinite(largest), 0, bad)


def _padded_copy(logits: Tensor, rows: Tensor) -> Tensor:
    """Some rows, their width padded to whole tiles with -inf."""
    vocab_size = logits.shape[1]
    if vocab_size % TILE == 0:
        return logits[rows]
    copy = logits.new_full((len(rows), -(-vocab_size // TILE) * TILE), float("-inf"))
    copy[:, :vocab_size] = logits[rows]
    return copy


def _weights(logits: Tensor, largest: Tensor, params: np.ndarray) -> Tensor:
    """What ``draw`` draws by, 0 for what is not kept; ``logits`` is used up."""
    device = logits.device
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
    return weights


def _on_rows(values: Tensor, which: np.ndarray, change: Callable[[Tensor], object]) -> None:
    """``change`` some rows in place; without a copy where it is all of them."""
    part = _taken(values, which)
    change(part)
    if part is not values:
        values[torch.from_numpy(which).to(values.device)] = part


def _taken(values: Tensor, which: np.ndarray) -> Tensor:
    """Some rows (ascending): ``values`` itself where it is all of them."""
    return values if len(which) == len(values) else values[torch.from_numpy(which).to(values.device)]
