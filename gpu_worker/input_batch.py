"""One step's batch: from rows of a checked plan to the tensors that a forward takes.

Built by the model runner after the plan's admissions and growth.  The tokens of all rows lie
one after another, each row's at consecutive positions, padded up to a bucket: padding tokens
have id 0, position 0 and slot -1, belong to no row and are seen by none.  A row samples if
and only if its computed tokens reach its known tokens; behind each draft it samples again, as
if the draft were right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpu_worker.attention.interface import AttentionMetadata
from gpu_worker.request_states import RequestStates
from gpu_worker.row_buckets import RowBuckets
from protocol.codec import BLOCK_SIZE_TOKENS

PADDING_SLOT = -1


@dataclass(frozen=True, slots=True)
class InputBatch:
    """What the forward and the sampler need; row r is row r of the plan (``batch_idx``)."""

    req_idx: np.ndarray            # int64 [num_rows]
    num_computed: np.ndarray       # int64 [num_rows] before this step
    num_new: np.ndarray            # int64 [num_rows] tokens of this step
    first_token: np.ndarray        # int64 [num_rows] index of the row's first token
    token_ids: Tensor              # int64 [num_padded_tokens]
    positions: Tensor              # int64 [num_padded_tokens]
    attention: AttentionMetadata
    num_drafts: np.ndarray         # int64 [num_rows]
    sampling: np.ndarray           # int64 [num_samples] batch_idx of what is sampled, ascending: a row once, and once for each draft
    sample_number: np.ndarray      # int64 [num_samples] 0, 1, ... within a row
    logits_indices: Tensor         # int64 [bucket(num_samples)] tokens they follow; padding repeats token 0

    @property
    def num_tokens(self) -> int:
        return self.attention.num_tokens


def build_batch(req_idx: np.ndarray, num_new: np.ndarray, num_drafts: np.ndarray, states: RequestStates, buckets: RowBuckets) -> InputBatch:
    """``num_new[r]`` (at least 1) tokens of row ``req_idx[r]``, from its first uncomputed one on; the
    last ``num_drafts[r]`` of them are guessed, and stand behind the known ones in the table."""
    device = states.token_ids.device
    num_computed = states.num_computed[req_idx]
    seq_lens = num_computed + num_new
    ends = np.cumsum(num_new)
    first_token = ends - num_new
    num_tokens = int(ends[-1])
    num_padded = buckets.bucket(num_tokens)

    row_of_token = np.repeat(np.arange(len(req_idx)), num_new)
    position = np.arange(num_tokens) - np.repeat(first_token - num_computed, num_new)
    table_row = req_idx[row_of_token]
    block = states.block_table[table_row, position // BLOCK_SIZE_TOKENS].astype(np.int64)
    slot_mapping = _padded(block * BLOCK_SIZE_TOKENS + position % BLOCK_SIZE_TOKENS, num_padded, PADDING_SLOT)
    # on the device: a token sampled by the step before may not have reached the host
    place = torch.from_numpy(table_row * states.max_model_len + position).to(device)
    token_ids = torch.zeros(num_padded, dtype=torch.int64, device=device)
    token_ids[:num_tokens] = states.token_ids.view(-1).index_select(0, place)

    num_blocks = -(-int(seq_lens.max()) // BLOCK_SIZE_TOKENS)
    attention = AttentionMetadata(
        query_start_loc=_move(np.concatenate(([0], ends)).astype(np.int32), device),
        seq_lens=_move(seq_lens.astype(np.int32), device),
        block_table=_move(states.block_table[req_idx, :num_blocks], device),
        slot_mapping=_move(slot_mapping, device),
        query_lens_host=num_new.astype(np.int32), seq_lens_host=seq_lens.astype(np.int32), num_tokens=num_tokens)
    sampling, number = _samples(np.flatnonzero(seq_lens - num_drafts == states.num_tokens[req_idx]), num_drafts)
    return InputBatch(
        req_idx=req_idx, num_computed=num_computed, num_new=num_new, first_token=first_token,
        token_ids=token_ids, positions=_move(_padded(position, num_padded, 0), device), attention=attention,
        num_drafts=num_drafts, sampling=sampling, sample_number=number,
        logits_indices=logits_indices((ends - num_drafts)[sampling] - 1 + number, buckets, device))


def _samples(rows: np.ndarray, num_drafts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, number within it) of each sample: behind the last known token, and behind each draft."""
    count = 1 + num_drafts[rows]
    row = np.repeat(rows, count)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)


def logits_indices(tokens: np.ndarray, buckets: RowBuckets, device: torch.device) -> Tensor:
    """The tokens whose logits are wanted, padded for lm_head; empty for none."""
    return _move(_padded(tokens, buckets.bucket(len(tokens)) if len(tokens) else 0, 0), device)


def _padded(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    padded = np.full(length, fill, dtype=np.int64)
    padded[:len(values)] = values
    return padded


def _move(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
