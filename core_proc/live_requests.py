"""All live requests: waiting in a queue, running in rows, in one total order.

Owned by ``EngineCore``; the only place that moves a request from one state to another.
Rows and blocks of a request that leaves are free at once, since the worker runs plans in
order; its entries in steps still under way are kept there under its name.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from operator import attrgetter

import numpy as np

from core_proc.kv_cache_manager import KVCacheManager
from core_proc.request import Request, RequestStatus
from core_proc.request_queue import RequestQueue
from core_proc.request_rows import RequestRows
from core_proc.step import Step
from protocol.messages import Finish

_order = attrgetter("order")


class LiveRequests:
    """``running`` and ``order`` (its req_idx; intp, which NumPy indexes with three times as fast) are parallel and sorted by
    the total order."""

    def __init__(self, rows: RequestRows, kv: KVCacheManager, waiting: RequestQueue, steps: deque[Step]) -> None:
        self.rows, self.kv, self.waiting = rows, kv, waiting
        self.running: list[Request] = []
        self.order = np.empty(0, np.intp)
        self.num_cached_tokens = 0       # known tokens that first admissions hit, ever
        self._by_id: dict[tuple[bytes, int], Request] = {}
        self._steps = steps              # in flight
        self._next_serial = 1

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._by_id.values()))

    def get(self, key: bytes, child: int) -> Request | None:
        return self._by_id.get((key, child))

    def children(self, key: bytes, max_children: int) -> list[Request]:
        return [r for child in range(max_children) if (r := self._by_id.get((key, child))) is not None]

    def first(self) -> Request:
        """First of all in the total order; it is never preempted."""
        heads = self.running[:1] + ([self.waiting.peek()] if len(self.waiting) else [])
        return min(heads, key=_order)

    def add(self, request: Request) -> None:
        self._by_id[request.key, request.child] = request
        self.waiting.push(request)

    def admit(self, request: Request, hits: list[int], num_blocks: int) -> None:
        """From the queue into a row, with the hit blocks and as many more as make ``num_blocks``."""
        self.waiting.remove(request)
        request.serial, self._next_serial = self._next_serial, self._next_serial + 1
        block_ids = self.kv.take(hits, num_blocks)
        self.rows.write(request, len(hits) * self.kv.block_size, block_ids, len(hits))
        request.status = RequestStatus.RUNNING
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = len(hits) * self.kv.block_size
            self.num_cached_tokens += request.num_cached_tokens
        at = bisect_left(self.running, request.order, key=_order)
        self.running.insert(at, request)
        self.order = np.concatenate((self.order[:at], (request.req_idx,), self.order[at:]))

    def preempt(self, request: Request) -> None:
        """Back to its place in the queue, without row and blocks; it will be recomputed."""
        self._leave(request)
        request.status = RequestStatus.WAITING
        self.waiting.prepend(request)

    def finish(self, request: Request, reason: Finish, stop_token: int = -1) -> None:
        """Out of everything; what it said stays in it."""
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        else:
            self.waiting.remove(request)
        request.status, request.finish, request.stop_token = RequestStatus.FINISHED, reason, stop_token
        del self._by_id[request.key, request.child]

    def forget_steps(self) -> None:
        """All steps in flight are dead: back to what has been confirmed."""
        for request in self.waiting:
            request.num_in_flight = request.steps_in_flight = 0
        rows = self.order
        self.rows.num_computed[rows] = self.rows.num_applied[rows]
        self.rows.in_flight[rows] = self.rows.steps[rows] = 0

    def _leave(self, request: Request) -> None:
        for step in self._steps:
            step.note_departure(request)
        at = bisect_left(self.running, request.order, key=_order)
        del self.running[at]
        self.order = np.concatenate((self.order[:at], self.order[at + 1:]))
        published = int(self.rows.published[request.req_idx])
        self.kv.release(request, self.rows.release(request), published)
