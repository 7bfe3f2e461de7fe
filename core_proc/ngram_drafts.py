"""Drafts by prompt lookup: what followed the last time that the newest tokens stood in a request.

Owned by the scheduler.  Drafts where they pay: a request is guessed at for as long as guesses
are right now and then, twice as far as the last one was right and a little more.  Blocks come
from the free ones, tokens from what the budget has left.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from core_proc.drafts import DraftSource
from core_proc.live_requests import LiveRequests
from core_proc.ngram_index import NgramIndex
from core_proc.step import ScheduledStep, StepLimits
from core_proc.step_clock import StepClock

PATIENCE = 16                # tokens that a request is guessed at without success
REVIVED = 8                  # the same, once it has said something again for as long as n-grams go
FIRST_DRAFTS = 2             # beyond twice what was right


class NgramDrafts(DraftSource):
    """At most ``most`` drafts a request and step."""

    def __init__(self, live: LiveRequests, clock: StepClock, most: int, longest: int, shortest: int) -> None:
        num_rows = live.rows.max_num_seqs
        self._live, self._clock, self._most, self._longest = live, clock, most, longest
        self._index = NgramIndex(live.rows, longest, shortest)
        self._serial = np.zeros(num_rows, np.int64)            # admission that a row's columns are about
        self._until = np.zeros(num_rows, np.int32)             # it is guessed at before it has so many tokens
        self._num_right = np.zeros(num_rows, np.int32)         # drafts of its last guess that were right
        self._guessed_at = np.zeros(num_rows, np.int32)        # tokens it had at its last guess, ...
        self._num_guessed = np.zeros(num_rows, np.int32)       # ... how many drafts that was (0: it has been judged), ...
        self._guess = np.zeros((num_rows, most), np.int32)     # ... and which

    def hold(self, rows: np.ndarray, held: np.ndarray) -> None:
        held |= self._are_guessed_at(rows) & (self._live.rows.in_flight[rows] > 0)

    def guesses_at(self, rows: np.ndarray) -> bool:
        return bool(self._are_guessed_at(rows).any())

    def _are_guessed_at(self, rows: np.ndarray) -> np.ndarray:
        columns = self._live.rows
        return (self._serial[rows] != columns.serial[rows]) | (columns.num_tokens[rows] < self._until[rows])

    def add_to(self, step: ScheduledStep, limits: StepLimits) -> ScheduledStep:
        at = np.flatnonzero((step.num_tokens == 1) & step.samples)
        if not at.size or step.preempted or limits.only is not None:
            return step
        rows, columns = step.rows[at], self._live.rows
        self._look(rows)
        self._index.catch_up(rows)
        source, length = self._index.find(rows)
        known = columns.num_tokens[rows]
        silent = (length == self._longest) & (known >= self._until[rows])
        self._until[rows[silent]] = known[silent] + REVIVED
        ready = (length > 0) & (known < self._until[rows]) & (columns.in_flight[rows] == 1)     # 1: this step's own
        count = np.where(ready, np.minimum(2 * self._num_right[rows] + FIRST_DRAFTS, self._most), 0)
        count = np.minimum(count, columns.max_total[rows] - known - 1)
        count = np.minimum(count, np.maximum(limits.num_tokens - int(step.num_tokens.sum()) - np.cumsum(count) + count, 0))
        if not count.any() or not self._pays(rows, count):
            return step
        count, grow = self._reserve(rows, count)
        return self._written(step, at, count, source, grow) if count.any() else step

    def _look(self, rows: np.ndarray) -> None:
        """How good the last guesses were, once the tokens are known; and who is new."""
        columns = self._live.rows
        new = rows[self._serial[rows] != columns.serial[rows]]
        if new.size:
            self._index.reset(new)
            self._serial[new] = columns.serial[new]
            self._until[new] = columns.num_tokens[new] + PATIENCE
            self._num_right[new] = self._num_guessed[new] = 0
        rows = rows[(self._num_guessed[rows] > 0) & (columns.num_tokens[rows] > self._guessed_at[rows])]
        if not rows.size:
            return
        number = np.arange(self._most)
        position = np.minimum(self._guessed_at[rows, None] + number, columns.num_tokens[rows, None] - 1)
        right = (columns.tokens[rows[:, None], position] == self._guess[rows]) & (number < self._num_guessed[rows, None])
        self._num_right[rows] = np.logical_and.accumulate(right, axis=1).sum(axis=1)
        self._num_guessed[rows] = 0
        useful = rows[self._num_right[rows] > 0]
        self._until[useful] = columns.num_tokens[useful] + PATIENCE

    def _pays(self, rows: np.ndarray, count: np.ndarray) -> bool:
        """Whether tokens come faster with these drafts, by what steps of such sizes have taken."""
        before_us, after_us = (self._clock.decodes.measured_at(len(rows) + n) for n in (0, int(count.sum())))
        if before_us is None or after_us is None:
            return True              # to find out
        gained = int(np.minimum(count, np.maximum(self._num_right[rows], 1)).sum())
        if (len(rows) + gained) * before_us >= len(rows) * after_us:
            return True
        self._until[rows] = 0        # until they say again what they have said before
        return False

    def _reserve(self, rows: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(drafts for which there is place, further blocks); counted as under way."""
        live, columns, size = self._live, self._live.rows, self._live.kv.block_size
        missing = live.kv.missing(rows, count)
        short = np.cumsum(missing) > live.kv.num_free
        here = columns.num_blocks[rows] * size - columns.num_computed[rows]        # places in blocks that they have
        count = np.where(short, np.minimum(count, here), count)
        columns.num_computed[rows] += count
        columns.in_flight[rows] += count
        return count, live.kv.grow(rows, np.where(short, 0, missing))

    def _written(self, step: ScheduledStep, at: np.ndarray, count: np.ndarray, source: np.ndarray, grow: np.ndarray) -> ScheduledStep:
        rows = step.rows[at]
        drafts = self._index.following(rows, source, count)
        row, number = np.repeat(rows, count), np.arange(len(drafts)) - np.repeat(np.cumsum(count) - count, count)
        self._guess[row, number] = drafts
        self._guessed_at[rows], self._num_guessed[rows] = self._live.rows.num_tokens[rows], count
        num_drafts = np.zeros(len(step.rows), np.int32)
        num_drafts[at] = count
        return replace(step, num_tokens=step.num_tokens + num_drafts, num_drafts=num_drafts, drafts=drafts,
                       grow=np.concatenate([step.grow, grow]))
