"""What the worker knows of each running request: one row of several tables, by ``req_idx``.

Owned by the model runner.  A row is written whole by its admission and inherits nothing from
its predecessor; ``PARAMS_DTYPE`` is assigned as one tuple so that no column can be forgotten.
Whatever sampling needs beyond the params (penalty counts, how many tokens are still to come
before EOS is allowed) is computed from token ids, ``prompt_len`` and params each time, never
kept: so a resumed request needs no more than its admission.

``token_ids`` lives on the device, for a sampled token is known there first.  All other tables
live on the host, which can foresee them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocol.codec import BLOCK_SIZE_TOKENS, f32_column, i32_column
from protocol.sampling_params import TokenParams
from protocol.steps import Admission

PARAMS_DTYPE = np.dtype([
    ("greedy", "?"), ("temperature", "f4"), ("top_k", "i4"), ("top_p", "f8"), ("min_p", "f4"),
    ("penalized", "?"), ("repetition_penalty", "f4"), ("presence_penalty", "f4"), ("frequency_penalty", "f4"),
    ("min_tokens", "i4"), ("has_lists", "?"), ("logprobs", "i4"), ("prompt_logprobs", "i4"), ("seed", "u8")])
NO_LOGPROBS = -1
ANY_TOKEN = -1          # fills the front of a short bad word


@dataclass(frozen=True, slots=True)
class TokenLists:
    """A request's params of variable length, as int64 and float32 arrays."""

    allowed: np.ndarray | None       # [n] None: all
    bias_ids: np.ndarray             # [n]
    bias_values: np.ndarray          # [n]
    end_ids: np.ndarray              # [n] EOS and stop ids, masked before min_tokens
    bad_prefixes: np.ndarray         # [words, longest - 1] tokens before the last, ANY_TOKEN in front
    bad_last: np.ndarray             # [words]
    bad_lengths: np.ndarray          # [words]

    @classmethod
    def of(cls, params: TokenParams) -> TokenLists:
        lengths = i32_column(params.bad_words_lengths).astype(np.int64)
        flat = i32_column(params.bad_words_ids, int(lengths.sum()), "bad_words").astype(np.int64)
        words = np.full((len(lengths), int(lengths.max(initial=1))), ANY_TOKEN, dtype=np.int64)
        words[np.arange(words.shape[1]) >= words.shape[1] - lengths[:, None]] = flat
        allowed = params.allowed_token_ids
        bias_ids = i32_column(params.logit_bias_ids).astype(np.int64)
        return cls(
            allowed=None if allowed is None else i32_column(allowed).astype(np.int64), bias_ids=bias_ids,
            bias_values=f32_column(params.logit_bias_values, len(bias_ids), "logit_bias"),
            end_ids=np.concatenate((i32_column(params.eos_token_ids), i32_column(params.stop_token_ids))).astype(np.int64),
            bad_prefixes=words[:, :-1], bad_last=words[:, -1], bad_lengths=lengths)

    def any(self) -> bool:
        """Whether some of them act on the logits of every token."""
        return self.allowed is not None or len(self.bias_ids) > 0 or len(self.bad_last) > 0


def _params_row(params: TokenParams, lists: TokenLists, seed: int) -> tuple:
    """One value for each field of ``PARAMS_DTYPE``, in its order."""
    penalized = params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    return (params.greedy, params.temperature, params.top_k, params.top_p, params.min_p,
            penalized, params.repetition_penalty, params.presence_penalty, params.frequency_penalty,
            params.min_tokens if len(lists.end_ids) else 0, lists.any(),
            NO_LOGPROBS if params.logprobs is None else params.logprobs,
            NO_LOGPROBS if params.prompt_logprobs is None else params.prompt_logprobs, seed)


class RequestStates:
    """The tables; ``num_tokens == 0`` marks a row that nobody has been admitted to."""

    def __init__(self, max_num_seqs: int, max_model_len: int, vocab_size: int, num_blocks: int, device: torch.device) -> None:
        self.max_num_seqs, self.max_model_len, self.vocab_size, self.num_blocks = max_num_seqs, max_model_len, vocab_size, num_blocks
        self.max_blocks = -(-max_model_len // BLOCK_SIZE_TOKENS)
        self.token_ids = self._token_table(device)
        self.block_table = np.zeros((max_num_seqs, self.max_blocks), dtype=np.int32)
        self.num_row_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)        # known: prompt and output so far
        self.prompt_len = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_computed = np.zeros(max_num_seqs, dtype=np.int64)      # K/V stored
        self.params = np.zeros(max_num_seqs, dtype=PARAMS_DTYPE)
        self.lists: list[TokenLists | None] = [None] * max_num_seqs

    def _token_table(self, device: torch.device) -> Tensor:
        """int32 [max_num_seqs, max_model_len]; on a CPU pages come from the system when first touched."""
        if device.type != "cpu":
            return torch.zeros(self.max_num_seqs, self.max_model_len, dtype=torch.int32, device=device)
        return torch.from_numpy(np.zeros((self.max_num_seqs, self.max_model_len), dtype=np.int32))

    def table_bytes(self) -> int:
        return self.token_ids.numel() * 4 + self.block_table.nbytes

    def admit(self, admission: Admission, lists: TokenLists) -> None:
        """Write every column of the row."""
        row = admission.req_idx
        token_ids, block_ids = i32_column(admission.token_ids), i32_column(admission.block_ids)
        self.token_ids[row, :len(token_ids)] = torch.from_numpy(token_ids.copy()).to(self.token_ids.device)
        self.block_table[row] = 0
        self.block_table[row, :len(block_ids)] = block_ids
        self.num_row_blocks[row] = len(block_ids)
        self.num_tokens[row] = len(token_ids)
        self.prompt_len[row] = admission.prompt_len
        self.num_computed[row] = admission.num_computed
        self.params[row] = _params_row(admission.params, lists, admission.seed)
        self.lists[row] = lists

    def grow(self, req_idx: np.ndarray, block_ids: np.ndarray) -> None:
        """Append blocks to rows, in order; a row may be named several times."""
        for row, block_id in zip(req_idx.tolist(), block_ids.tolist(), strict=True):
            self.block_table[row, self.num_row_blocks[row]] = block_id
            self.num_row_blocks[row] += 1

    def advance(self, req_idx: np.ndarray, num_new: np.ndarray) -> None:
        """The K/V of ``num_new`` tokens a row stand in its blocks."""
        self.num_computed[req_idx] += num_new

    def write_drafts(self, req_idx: np.ndarray, num_drafts: np.ndarray, drafts: np.ndarray) -> None:
        """Behind the known tokens of rows, which do not grow by it; ``drafts`` row after row."""
        row = np.repeat(req_idx, num_drafts)
        number = np.arange(len(row)) - np.repeat(np.cumsum(num_drafts) - num_drafts, num_drafts)
        place = torch.from_numpy(row * self.max_model_len + self.num_tokens[row] + number).to(self.token_ids.device)
        self.token_ids.view(-1)[place] = torch.from_numpy(drafts).to(place.device).int()

    def append(self, req_idx: np.ndarray, sampled: Tensor, failed: Tensor) -> Tensor:
        """One token to each row, on the device; a failed row repeats its last one, so that the
        next step finds a valid id.  int64 [n] what was appended."""
        table = self.token_ids.view(-1)
        place = torch.from_numpy(req_idx * self.max_model_len + self.num_tokens[req_idx]).to(table.device)
        appended = torch.where(failed, table[place - 1].long(), sampled)
        table[place] = appended.int()
        self.num_tokens[req_idx] += 1
        return appended

    def forget_all(self) -> None:
        """No row belongs to anybody; the tables are overwritten by the next admissions."""
        self.num_tokens[:] = 0
