"""Bugs in what is done ahead, drafts and several steps in a plan, that the simulation has to find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

from core_proc import scheduler, step_results
from core_proc.live_requests import LiveRequests
from core_proc.ngram_drafts import NgramDrafts
from core_proc.request import Request
from core_proc.run_ahead import run_ahead
from core_proc.step import ScheduledStep, Step, StepLimits
from core_proc.step_results import StepTokens
from core_proc.stop_conditions import check_rows
from protocol.messages import Finish


def _sample_without_the_last_token() -> Any:
    return patch.object(NgramDrafts, "hold", lambda self, rows, held: None)


def _keep_rejected_drafts() -> Any:
    count_in = step_results._count_in

    def wrong(live: LiveRequests, suspects: Any, step: Step, here: np.ndarray, tokens: StepTokens) -> None:
        count_in(live, suspects, replace(step, num_drafts=None), here, tokens)

    return patch.object(step_results, "_count_in", wrong)


def _look_at_the_last_token_only() -> Any:
    def wrong(live: LiveRequests, _suspects: Any, step: Step, gained: np.ndarray, tokens: StepTokens) -> dict[Request, tuple]:
        columns, ends = live.rows, {}
        for at in np.flatnonzero(gained):
            row, count = step.rows[at:at + 1], int(tokens.num_out[at])
            new = tokens.ids[tokens.first[at]:tokens.first[at] + count]
            columns.tokens[row, columns.num_tokens[row] + np.arange(count)] = new
            columns.num_tokens[row] += count
            finish = Finish(check_rows(columns, row, new[-1:])[0])
            if finish is not Finish.NONE:
                ends[columns.request[row[0]]] = (finish, int(new[-1]) if finish is Finish.STOP else -1)
            if tokens.logprobs is not None:
                step_results._store_logprobs(columns.request[row[0]], tokens, at, count)
        return ends

    return patch.object(step_results, "_append", wrong)


def _guess_beyond_the_end() -> Any:
    add_to = NgramDrafts.add_to

    def wrong(self: NgramDrafts, step: ScheduledStep, limits: StepLimits) -> ScheduledStep:
        columns = self._live.rows
        columns.max_total += 2
        try:
            return add_to(self, step, limits)
        finally:
            columns.max_total -= 2

    return patch.object(NgramDrafts, "add_to", wrong)


def _guess_without_blocks() -> Any:
    def wrong(self: NgramDrafts, rows: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._live.rows.num_computed[rows] += count
        self._live.rows.in_flight[rows] += count
        return count, np.empty((0, 2), np.int32)

    return patch.object(NgramDrafts, "_reserve", wrong)


def _step_beyond_the_end() -> Any:
    def wrong(live: LiveRequests, step: ScheduledStep, most: int) -> ScheduledStep:
        live.rows.max_total += 1
        try:
            return run_ahead(live, step, most)
        finally:
            live.rows.max_total -= 1

    return patch.object(scheduler, "run_ahead", wrong)


def _step_while_somebody_waits() -> Any:
    class NobodyWaits:
        def __init__(self, live: LiveRequests) -> None:
            self.rows, self.kv, self.waiting = live.rows, live.kv, ()

    return patch.object(scheduler, "run_ahead", lambda live, step, most: run_ahead(NobodyWaits(live), step, most))


def _count_one_late_sample() -> Any:
    late_tokens = step_results._late_tokens

    def wrong(step: Step, here: np.ndarray, tokens: StepTokens) -> Any:
        return late_tokens(replace(step, samples=np.minimum(step.samples, 1)), here, tokens)

    return patch.object(step_results, "_late_tokens", wrong)


LOOKAHEAD_BUGS = {
    "a sample of one that is guessed at, while another is in flight": _sample_without_the_last_token,
    "rejected drafts that stay on the counters": _keep_rejected_drafts,
    "a stop looked for in the last token of a plan only": _look_at_the_last_token_only,
    "drafts beyond the last token": _guess_beyond_the_end,
    "drafts without blocks": _guess_without_blocks,
    "steps beyond the last token": _step_beyond_the_end,
    "several steps while somebody waits": _step_while_somebody_waits,
    "one late sample counted of several": _count_one_late_sample,
}
