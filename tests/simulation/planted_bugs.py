"""Bugs that the simulation has to find: each replaces a collaborator while it is planted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import msgspec
import numpy as np

from core_proc import engine_core
from core_proc.kv_cache_manager import KVCacheManager
from core_proc.live_requests import LiveRequests
from core_proc.plan_builder import build_plan
from core_proc.request import Request, RequestStatus
from core_proc.scheduler import Scheduler
from core_proc.step import StepLimits
from protocol.messages import Finish
from simulation.planted_lookahead_bugs import LOOKAHEAD_BUGS


def _publish_when_scheduled() -> Any:
    advance = Scheduler._advance

    def wrong(self: Scheduler, rows: np.ndarray, num_tokens: np.ndarray) -> Any:
        result = advance(self, rows, num_tokens)
        columns = self.live.rows
        for row in rows:
            confirmed = columns.num_applied[row]
            columns.num_applied[row] = columns.num_computed[row]
            self.live.kv.publish(columns.request[row])
            columns.num_applied[row] = confirmed
        return result

    return patch.object(Scheduler, "_advance", wrong)


def _restart_without_admissions() -> Any:
    def wrong(epoch: int, gen: int, step: Any, scheduled: Any, live: Any, restart_after: int | None) -> Any:
        plan = build_plan(epoch, gen, step, scheduled, live, None)
        return msgspec.structs.replace(plan, restart_after=restart_after)

    return patch.object(engine_core, "build_plan", wrong)


def _readmit_with_a_chunk_in_flight() -> Any:
    """Only samples are waited for."""
    admit = Scheduler._admit

    def wrong(self: Scheduler, limits: StepLimits, spent: int) -> Any:
        chunks = {r: r.steps_in_flight for r in self.live.waiting if r.steps_in_flight and not r.num_in_flight}
        for request in chunks:
            request.steps_in_flight = 0
        result = admit(self, limits, spent)
        for request, steps in chunks.items():
            if request.status is RequestStatus.RUNNING:
                self.live.rows.steps[request.req_idx] += steps
            else:
                request.steps_in_flight = steps
        return result

    return patch.object(Scheduler, "_admit", wrong)


def _wait_for_a_hash() -> Any:
    """Nobody takes back what a writer that is gone has announced."""
    note_writer, publish = KVCacheManager.note_writer, KVCacheManager.publish
    announced: WeakKeyDictionary[KVCacheManager, set[bytes]] = WeakKeyDictionary()

    def note(self: KVCacheManager, request: Request, start: int, end: int) -> None:
        note_writer(self, request, start, end)
        tokens = self.rows.tokens[request.req_idx]
        announced.setdefault(self, set()).update(
            request.block_hash(index, tokens, self.block_size) for index in range(start // self.block_size, end // self.block_size))

    def published(self: KVCacheManager, request: Request) -> None:
        publish(self, request)
        announced.setdefault(self, set()).difference_update(request.hashes_from(0)[:int(self.rows.published[request.req_idx])])

    def wrong(self: KVCacheManager, request: Request, index: int) -> bool:
        matchable = index < self._num_matchable(request)
        return matchable and request.block_hash(index, request.token_ids, self.block_size) in announced.get(self, ())

    return patch.multiple(KVCacheManager, note_writer=note, publish=published, is_being_written=wrong)


def _keep_a_block_of_an_abort_in_flight() -> Any:
    finish = LiveRequests.finish

    def wrong(self: LiveRequests, request: Request, reason: Finish, stop_token: int = -1) -> None:
        row = request.req_idx
        if reason is Finish.ABORT and row >= 0 and self.rows.steps[row] and self.rows.num_blocks[row]:
            self.rows.num_blocks[row] -= 1
        finish(self, request, reason, stop_token)

    return patch.object(LiveRequests, "finish", wrong)


BUGS = {
    "publishing when scheduled": _publish_when_scheduled,
    "a restart that does not re-admit": _restart_without_admissions,
    "re-admission while a chunk of the request is in flight": _readmit_with_a_chunk_in_flight,
    "waiting for a hash instead of a living writer": _wait_for_a_hash,
    "a block not freed on an abort in flight": _keep_a_block_of_an_abort_in_flight,
} | LOOKAHEAD_BUGS


@contextmanager
def plant(bug: str) -> Iterator[None]:
    """Within it the core has ``bug``."""
    with BUGS[bug]():
        yield
