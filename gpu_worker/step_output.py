"""What the rows of a step gave, as columns of its result.

Called by the model runner, which samples once for each time that a plan is run.  A row's
tokens count up to its first error; what it samples after that is filler that keeps its length
as the next plan expects it, and is not told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_worker.logprobs import Logprobs, joined, spread
from protocol.codec import i32_bytes


@dataclass(frozen=True, slots=True)
class Samples:
    """The tokens of one time round, on the device."""

    batch_idx: np.ndarray      # int64 [n] row of each, ascending
    token_ids: Tensor          # int64 [n] what entered the tables
    errors: Tensor             # int64 [n] RowError, 0: none
    asked: np.ndarray          # int64 [k] those whose logprobs somebody wants, ascending
    logprobs: Logprobs | None  # of ``asked``; None for none


def output_columns(rounds: list[Samples], num_rows: int) -> dict[str, Any]:
    """Fields of the StepResult of a plan with ``num_rows`` rows."""
    row = np.concatenate([samples.batch_idx for samples in rounds])
    tokens = torch.cat([samples.token_ids for samples in rounds])
    token_ids, errors = torch.stack((tokens, torch.cat([samples.errors for samples in rounds]))).cpu().numpy()
    order = np.argsort(row, kind="stable")             # row after row, each in the order of its rounds
    row, token_ids, failed = row[order], token_ids[order], errors[order] != 0
    num_failed = np.cumsum(failed)
    first = np.searchsorted(row, row)                  # the first sample of the same row
    num_failed -= (num_failed - failed)[first]         # within the row
    good = num_failed == 0
    first_error = np.flatnonzero(failed & (num_failed == 1))
    row_errors = np.stack((row[first_error], errors[order][first_error]), axis=1)
    return {
        "num_out": i32_bytes(np.bincount(row[good], minlength=num_rows)), "token_ids": i32_bytes(token_ids[good]),
        "row_errors": i32_bytes(row_errors) if len(row_errors) else None, "logprobs": _logprob_rows(rounds, order, good)}


def _logprob_rows(rounds: list[Samples], order: np.ndarray, good: np.ndarray) -> Any:
    """One row for each token of the result; None where nobody asked."""
    found = [samples.logprobs for samples in rounds if samples.logprobs is not None]
    if not found or not good.any():
        return None
    begins = np.cumsum([0] + [len(samples.batch_idx) for samples in rounds])
    asked = np.concatenate([samples.asked + begin for samples, begin in zip(rounds, begins, strict=False)])
    place = np.empty_like(order)
    place[order] = np.where(good, np.cumsum(good) - 1, -1)
    kept = place[asked] >= 0
    rows = joined(found)
    return spread(Logprobs(rows.ids[kept], rows.values[kept], rows.ranks[kept]), place[asked[kept]], int(good.sum()))
