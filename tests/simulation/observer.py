"""How often the rare states were reached, seen from outside."""

from __future__ import annotations

from collections import Counter
from typing import Any

from core_proc.engine_core import EngineCore
from core_proc.request import Request, RequestStatus
from protocol.codec import i32_column
from protocol.messages import Finish
from protocol.steps import StepPlan
from simulation.reference import Wish

RARE_STATES = (
    "preemption", "prefix hit on a block just published", "abort in flight", "finish on a late token",
    "continuation of a finish on a block boundary", "eviction of a published block",
    "failed step with another in flight", "preempted with a chunk in flight")


class Observer:
    """Looks over the shoulders of pool and live requests; counts each state once a seed."""

    def __init__(self, core: EngineCore, reached: Counter[str]) -> None:
        self.core, self.reached = core, reached
        self.seen: set[str] = set()
        self._just_published: set[int] = set()
        self._published_now: set[int] = set()
        self._boundary: set[bytes] = set()       # keys of continuations
        for target, name, watch in ((core.kv.pool, "publish", self._on_publish), (core.live, "admit", self._on_admit),
                                    (core.live, "preempt", self._on_preempt), (core.live, "finish", self._on_finish)):
            setattr(target, name, _watched(getattr(target, name), watch))

    def continues(self, wish: Wish) -> None:
        if wish.continues:
            self._boundary.add(wish.key)

    def aborting(self, wish: Wish) -> None:
        request = self.core.live.get(wish.key, wish.child)
        if request is not None and self._steps_of(request):
            self.seen.add("abort in flight")

    def planned(self, plan: StepPlan, world: Any) -> None:
        assert i32_column(plan.num_tokens).sum() <= self.core.memory.budget <= world.config.max_num_batched_tokens, "budget"
        assert len(i32_column(plan.rows)) <= world.config.max_num_seqs, "rows"
        assert len(self.core.steps) <= self.core.window, "window"

    def failed(self) -> None:
        if len(self.core.steps) > 1 and not self.core.steps[0].dead:
            self.seen.add("failed step with another in flight")

    def applied(self) -> None:
        self._just_published, self._published_now = self._published_now, set()
        if self.core.kv.pool.num_evicted:
            self.seen.add("eviction of a published block")

    def done(self, steps: int) -> None:
        self.reached["steps"] += steps
        self.reached["seeds"] += 1
        self.reached["requests"] += len({stream for channel in self.core.channels.values() for stream in channel.streams})
        self.reached.update(self.seen)

    def _on_publish(self, block_id: int, _block_hash: bytes) -> None:
        self._published_now.add(block_id)

    def _on_admit(self, request: Request, hits: list[int], _num_blocks: int) -> None:
        if self._just_published & set(hits):
            self.seen.add("prefix hit on a block just published")
        if request.key in self._boundary:
            self.seen.add("continuation of a finish on a block boundary")

    def _on_preempt(self, request: Request) -> None:
        self.seen.add("preemption")
        rows, row = self.core.rows, request.req_idx
        if rows.steps[row] and not rows.in_flight[row]:
            self.seen.add("preempted with a chunk in flight")

    def _on_finish(self, request: Request, reason: Finish, _stop_token: int = -1) -> None:
        if request.status is RequestStatus.WAITING and reason in (Finish.STOP, Finish.LENGTH):
            self.seen.add("finish on a late token")

    def _steps_of(self, request: Request) -> int:
        return int(self.core.rows.steps[request.req_idx]) if request.req_idx >= 0 else request.steps_in_flight


def _watched(method: Any, watch: Any) -> Any:
    def call(*arguments: Any, **keywords: Any) -> Any:
        watch(*arguments, **keywords)
        return method(*arguments, **keywords)

    return call
