"""Which tokens of which requests the next step computes.

Called by ``EngineCore``.  There is no prefill phase and no decode phase: every request's
computed tokens chase its known tokens (and the samples under way) within one token budget.
Decides only; ``LiveRequests`` moves requests, ``KVCacheManager`` moves blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from core_proc.drafts import DraftSource
from core_proc.live_requests import LiveRequests
from core_proc.request import Request
from core_proc.run_ahead import run_ahead
from core_proc.step import ScheduledStep, StepLimits

MAX_PASSED_OVER = 64         # waiting requests looked at behind one that cannot go yet


class SchedulerInterface(ABC):
    """What ``EngineCore`` asks of a scheduler."""

    @abstractmethod
    def schedule(self, limits: StepLimits) -> ScheduledStep:
        """The next step; its ``rows`` may be empty.  Counters, rows and blocks have been moved for it."""

    @abstractmethod
    def some_need_their_samples(self) -> bool:
        """Whether running requests are left out of the next step until a result comes."""


class Scheduler(SchedulerInterface):
    """Running requests first, in the total order; then the waiting ones, as far as everything lasts."""

    def __init__(self, live: LiveRequests, watermark_blocks: int, drafts: DraftSource) -> None:
        self.live = live
        self.watermark_blocks = watermark_blocks
        self.drafts = drafts

    def schedule(self, limits: StepLimits) -> ScheduledStep:
        live = self.live
        rows, num_tokens, missing, preempted = self._plan_running(limits)
        grow = live.kv.grow(rows, missing)
        if np.count_nonzero(num_tokens) < len(rows):
            chosen = num_tokens > 0
            rows, num_tokens = rows[chosen], num_tokens[chosen]
        starts, samples = self._advance(rows, num_tokens)
        admitted: list[Request] = []
        if len(live.waiting) and not preempted:    # what was taken from one must not go to the next
            admitted, *columns = self._admit(limits, int(num_tokens.sum()))
            if admitted:
                rows, num_tokens, starts, samples = (
                    np.concatenate(pair) for pair in zip((rows, num_tokens, starts, samples), columns, strict=True))
        step = ScheduledStep(*_decodes_first(rows, starts, num_tokens, samples), grow, admitted, preempted)
        step = self.drafts.add_to(step, limits)
        return step if self.drafts.guesses_at(step.rows) else run_ahead(live, step, limits.num_steps)

    def some_need_their_samples(self) -> bool:
        held = np.zeros(len(self.live.order), bool)
        self.drafts.hold(self.live.order, held)
        return bool(held.any())

    def _plan_running(self, limits: StepLimits) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Request]]:
        """(rows, tokens and further blocks of each, requests preempted to make room for these)."""
        live, columns = self.live, self.live.rows
        rows = live.order
        if limits.only is not None:
            rows = np.array([r.req_idx for r in live.running if r in limits.only], np.intp)
        expected = columns.num_tokens[rows] + columns.in_flight[rows]
        left = expected - columns.num_computed[rows]
        held = expected >= columns.max_total[rows]     # its last sample is under way ...
        self.drafts.hold(rows, held)                   # ... or one that has to be known first
        if np.count_nonzero(held):
            left[held & (left == 1)] = 0
        num_tokens = share_budget(left, limits.num_tokens)
        missing = live.kv.missing(rows, num_tokens)
        preempted: list[Request] = []
        while int(missing.sum()) > live.kv.num_free:
            victim = live.running[-1]
            if victim is live.first():
                raise AssertionError("the first request does not fit, though it alone may hold blocks")
            if len(rows) and rows[-1] == victim.req_idx:
                rows, num_tokens, missing = rows[:-1], num_tokens[:-1], missing[:-1]
            live.preempt(victim)
            preempted.append(victim)
        return rows, num_tokens, missing, preempted

    def _advance(self, rows: np.ndarray, num_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens computed before, whether the row samples); counts the step as under way."""
        columns, size = self.live.rows, self.live.kv.block_size
        starts, known, in_flight = columns.num_computed[rows], columns.num_tokens[rows], columns.in_flight[rows]
        after = starts + num_tokens
        samples = after == known + in_flight
        columns.num_computed[rows] = after
        columns.in_flight[rows] = in_flight + samples
        columns.steps[rows] += 1
        known = np.minimum(after, known)
        filling = (known // size > starts // size).nonzero()[0]
        for row, start, end in zip(*(column[filling].tolist() for column in (rows, starts, known)), strict=True):
            self.live.kv.note_writer(columns.request[row], start, end)
        return starts, samples

    def _advance_admitted(self, request: Request, start: int, num_tokens: int) -> bool:
        """The same for one that has just been given its row: whether it samples."""
        columns, row, after = self.live.rows, request.req_idx, start + num_tokens
        samples = bool(after == columns.num_tokens[row])       # none is under way
        columns.num_computed[row] = after
        columns.in_flight[row] += samples
        columns.steps[row] += 1
        self.live.kv.note_writer(request, start, after)
        return samples

    def _admit(self, limits: StepLimits, spent: int) -> tuple[list[Request], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(requests admitted, their rows, tokens, starts, samples), in the total order."""
        live, kv = self.live, self.live.kv
        budget, passed_over = limits.num_tokens - spent, 0
        admitted: list[Request] = []
        entries: list[tuple[int, int, int]] = []
        samples: list[bool] = []
        for request in live.waiting:
            full = len(live.running) >= limits.num_rows or not live.rows.num_free
            if full or budget <= 0 or passed_over >= MAX_PASSED_OVER:
                break
            if request.steps_in_flight or (limits.only is not None and request not in limits.only):
                continue
            hits = kv.match(request)
            if kv.is_being_written(request, len(hits)):
                passed_over += 1
                continue
            mark = self.watermark_blocks if live.running else 0
            free = kv.num_free - kv.pool.count_free(hits) - mark
            if kv.blocks_for(request.num_tokens) - len(hits) > free:
                break    # nobody behind it may take its blocks
            start = len(hits) * kv.block_size
            count = min(request.num_tokens - start, budget)
            live.admit(request, hits, kv.blocks_for(start + count))
            admitted.append(request)
            entries.append((request.req_idx, count, start))
            samples.append(self._advance_admitted(request, start, count))
            budget -= count
        table = np.array(entries, np.int32).reshape(-1, 3)
        return admitted, table[:, 0], table[:, 1], table[:, 2], np.array(samples, bool)


def _decodes_first(rows: np.ndarray, starts: np.ndarray, num_tokens: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, ...]:
    is_chunk = num_tokens > 1
    num_chunks = np.count_nonzero(is_chunk)
    if np.count_nonzero(is_chunk[len(rows) - num_chunks:]) == num_chunks:
        return rows, starts, num_tokens, samples
    order = np.argsort(is_chunk, kind="stable")
    return rows[order], starts[order], num_tokens[order], samples[order]


def share_budget(left: np.ndarray, budget: int) -> np.ndarray:
    """Tokens for each running request of a step, in order: i32[n].

    ``left``: tokens that each still has to compute.  A chunk leaves one token for each decode
    behind it, but takes one at least.
    """
    num_tokens = np.minimum(left, 1)
    if len(left) <= budget and not np.count_nonzero(left > 1):
        return num_tokens
    decodes_before = np.cumsum(left == 1) - (left == 1)
    num_decodes, spent = int((left == 1).sum()), 0
    for i in np.flatnonzero(left > 1):
        free = budget - int(decodes_before[i]) - spent
        behind = num_decodes - int(decodes_before[i])
        num_tokens[i] = min(int(left[i]), max(1, free - behind)) if free > 0 else 0
        spent += int(num_tokens[i])
    before = np.cumsum(num_tokens) - num_tokens
    num_tokens[before >= budget] = 0
    return num_tokens
