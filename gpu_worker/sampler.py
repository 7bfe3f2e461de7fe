"""From logits to one token a row.

Called by the model runner once a step.  One path a request, whatever the batch: raw logits,
then masks, bias and penalties (``logit_changes.py``), temperature, min_p, top_k and top_p, and
a draw with the noise of (seed, position).  The arithmetic of the last four is the picker's
(``picking.py``).  Only the rows that ask for something pay for it: plain greedy rows cost one
argmax.  Nothing is kept between steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gpu_worker.logit_changes import SamplingRows, change_logits
from gpu_worker.noise import uniforms
from gpu_worker.picking import Picker, Sampled
from protocol.steps import RowError


def sample(logits: Tensor, rows: SamplingRows, picker: Picker) -> Sampled:
    """``logits`` float32 [at least n, vocab_size], row r for ``rows[r]``; not changed."""
    logits = logits[:len(rows.req_idx)]
    changed, random = rows.changed(), ~rows.params["greedy"]
    sampled = _picked(logits, rows, random & ~changed, picker, RowError.NAN_LOGITS)
    if changed.any():
        place = torch.from_numpy(np.flatnonzero(changed)).to(logits.device)
        copy, part = logits[place], rows.take(np.flatnonzero(changed))
        change_logits(copy, part)
        picked = _picked(copy, part, random[changed], picker, RowError.EMPTY_MASK)
        raw = sampled.errors[place]
        sampled.token_ids[place] = picked.token_ids
        sampled.errors[place] = torch.where(raw == 0, picked.errors, raw)
    return sampled


def _picked(logits: Tensor, rows: SamplingRows, random: np.ndarray, picker: Picker, empty: RowError) -> Sampled:
    """One draw for the rows that are ``random`` (bool [n]), the largest logit's token for the others."""
    which = np.flatnonzero(random)
    if not len(which):
        return picker.largest(logits, empty)
    params = rows.params[which]
    drawn = picker.random(logits, which, params, uniforms(params["seed"], rows.num_tokens[which]), empty)
    if len(which) == len(random):
        return drawn
    sampled, place = picker.largest(logits, empty), torch.from_numpy(which).to(logits.device)
    sampled.token_ids[place], sampled.errors[place] = drawn.token_ids, drawn.errors
    return sampled
