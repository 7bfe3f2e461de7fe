"""The numbers of running requests, one row each, as NumPy columns.

Owned by ``LiveRequests``.  A step over hundreds of requests is a few operations on columns
and touches only the Python objects of requests that change.
"""

from __future__ import annotations

import numpy as np

from core_proc.request import Request

STOP_COLUMNS = 8         # stop ids looked at in columns; a request with more is looked at alone


class RequestRows:
    """Rows 0 … max_num_seqs - 1; what a column holds of a free row means nothing."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        def column() -> np.ndarray:
            return np.zeros(max_num_seqs, np.int32)

        self.max_num_seqs, self.block_size = max_num_seqs, block_size
        self.num_tokens = column()       # known: prompt and output
        self.num_computed = column()     # scheduled, optimistic
        self.num_applied = column()      # confirmed by a result
        self.in_flight = column()        # samples scheduled, not yet reported
        self.steps = column()            # plans that hold the row, not yet reported
        self.highest = column()          # most tokens ever applied
        self.num_blocks = column()       # in the block table
        self.published = column()        # blocks offered to the prefix cache
        self.prompt_len = column()
        self.min_total = column()        # tokens before which no stop id counts
        self.max_total = column()        # tokens at which it ends
        self.sent = column()             # tokens already in Outputs, prompt counted
        self.emit_at = column()          # num_tokens at which the next Outputs is due
        self.interval = column()         # tokens from one Outputs to the next
        self.stream = column()
        self.channel = column()          # index of its channel, -1: nobody listens
        self.logprobs = np.zeros(max_num_seqs, bool)
        self.many_stops = np.zeros(max_num_seqs, bool)
        self.serial = np.zeros(max_num_seqs, np.int64)                           # of the admission; 0: free
        self.stop_ids = np.full((max_num_seqs, STOP_COLUMNS), -1, np.int32)
        self.tokens = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.block_table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self.request: list[Request | None] = [None] * max_num_seqs
        self._flat_tokens = self.tokens.reshape(-1)
        self._free = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def write(self, request: Request, num_computed: int, block_ids: list[int], num_published: int) -> None:
        """Give ``request`` a row and write every column of it."""
        row = request.req_idx = self._free.pop()
        known = request.num_tokens
        self.request[row] = request
        self.serial[row] = request.serial
        self.num_tokens[row] = known
        self.num_computed[row] = self.num_applied[row] = num_computed
        self.in_flight[row] = request.num_in_flight
        self.steps[row] = request.steps_in_flight
        self.highest[row] = request.num_computed_highest
        self.num_blocks[row] = len(block_ids)
        self.published[row] = num_published
        self.prompt_len[row] = request.prompt_len
        self.min_total[row] = request.min_total_tokens
        self.max_total[row] = request.max_total_tokens
        self.sent[row], self.emit_at[row] = request.sent_tokens, request.emit_at
        self.interval[row], self.stream[row] = request.stream_interval, request.stream
        self.channel[row] = -1 if request.channel is None else request.channel.index
        self.logprobs[row] = request.logprobs is not None
        self.many_stops[row] = len(request.stop_ids) > STOP_COLUMNS
        self.stop_ids[row] = -1
        if not self.many_stops[row]:
            self.stop_ids[row, :len(request.stop_ids)] = list(request.stop_ids)
        self.tokens[row, :known] = request.token_ids
        self.block_table[row, :len(block_ids)] = block_ids

    def release(self, request: Request) -> list[int]:
        """Take the row back, its numbers into ``request``; the block ids it held."""
        row = request.req_idx
        request.token_ids = self.tokens[row, :self.num_tokens[row]].copy()
        request.num_in_flight, request.steps_in_flight = int(self.in_flight[row]), int(self.steps[row])
        request.num_computed_highest = int(self.highest[row])
        request.sent_tokens, request.emit_at = int(self.sent[row]), int(self.emit_at[row])
        block_ids = self.blocks_of(row)
        self.request[row], self.serial[row], request.req_idx = None, 0, -1
        self._free.append(row)
        return block_ids

    def blocks_of(self, row: int) -> list[int]:
        return self.block_table[row, :self.num_blocks[row]].tolist()

    def tokens_at(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """One token of each row: i32[n].  By flat places, which takes half as long as by pairs."""
        return self._flat_tokens[rows * self.tokens.shape[1] + positions]

    def append_tokens(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """One more known token for each row."""
        known = self.num_tokens[rows]
        self._flat_tokens[rows * self.tokens.shape[1] + known] = tokens
        self.num_tokens[rows] = known + 1

    def append_blocks(self, pairs: np.ndarray) -> None:
        """``pairs``: i32[k, 2] (row, block_id); a row that needs several comes several times, in order."""
        for row, block_id in pairs.tolist():
            at = self.num_blocks[row]
            self.block_table[row, at] = block_id
            self.num_blocks[row] = at + 1
