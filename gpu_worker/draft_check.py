"""Which of the tokens that were sampled behind drafts count: those whose drafts before were right.

Called by the model runner in a step with drafts.  Each position is sampled with its own noise,
from logits that do not depend on the rows beside, and sees the drafts before it as tokens; so as
long as these are what was sampled, every token and logprob is that of single steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gpu_worker.input_batch import InputBatch
from gpu_worker.picking import Sampled
from gpu_worker.request_states import RequestStates


def accept(sampled: Sampled, batch: InputBatch, states: RequestStates) -> tuple[np.ndarray, Tensor]:
    """(bool [num_samples] those that count, int64 [num_samples] their token ids).

    They enter the tables, which end up as after single steps.  A failed one counts, with its
    predecessor's id as filler, and nothing behind it does.
    """
    row, number = batch.sampling, batch.sample_number
    req_idx = batch.req_idx[row]
    table = states.token_ids.view(-1)
    place = torch.from_numpy(req_idx * states.max_model_len + states.num_tokens[req_idx] + number).to(table.device)
    is_draft = torch.from_numpy(number < batch.num_drafts[row]).to(table.device)
    right = is_draft & (sampled.errors == 0) & (table[place] == sampled.token_ids)
    counts = _until_first_wrong(right.cpu().numpy(), number)
    token_ids = torch.where(sampled.errors != 0, table[place - 1].long(), sampled.token_ids)
    kept = torch.from_numpy(counts).to(table.device)
    table[place[kept]] = token_ids[kept].int()
    gained = np.bincount(row[counts], minlength=len(batch.req_idx))
    states.num_tokens[batch.req_idx] += gained
    states.advance(batch.req_idx, batch.num_new - np.where(gained > 0, 1 + batch.num_drafts - gained, 0))
    return counts, token_ids


def _until_first_wrong(right: np.ndarray, number: np.ndarray) -> np.ndarray:
    """bool [num_samples]: everything before it in the same row was right."""
    wrong_before = np.cumsum(~right) - ~right
    begins = np.flatnonzero(number == 0)
    return wrong_before == np.repeat(wrong_before[begins], np.diff(np.append(begins, len(number))))
