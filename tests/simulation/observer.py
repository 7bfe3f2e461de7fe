"""Looks over the core's shoulder: how often the rare states were reached, and rules that show only from inside."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from core_proc.engine_core import EngineCore
from core_proc.request import Request, RequestStatus
from core_proc.step import ScheduledStep, Step, StepLimits
from protocol.codec import i32_column
from protocol.messages import Finish
from protocol.steps import StepPlan, StepResult, StepStatus
from simulation.fake_worker import FakeWorker
from simulation.reference import Wish, prefixes

RARE_STATES = (
    "preemption", "prefix hit on a block just published", "abort in flight", "finish on a late token",
    "continuation of a finish on a block boundary", "eviction of a published block",
    "failed step with another in flight", "chunk in flight of a preempted request",
    "several steps in a plan", "several steps with another plan in flight", "late tokens of several steps", "stop id within several steps",
    "all drafts right", "some drafts right", "no draft right", "drafts beside a chunk", "drafts in a failed step",
    "stop id within drafts", "late tokens behind drafts", "a plan that the clock let go")


class Observer:
    """Watches pool, cache and live requests; counts each state once a seed."""

    def __init__(self, core: EngineCore, worker: FakeWorker, reached: Counter[str]) -> None:
        self.core, self.worker, self.reached = core, worker, reached
        self.seen: set[str] = set()
        self.num_requests = self.num_cached_tokens = 0
        self.missed: Request | None = None       # preempted just now, while steps hold it
        self._just_published: set[int] = set()
        self._published_now: set[int] = set()
        self._boundary: set[bytes] = set()       # keys of continuations
        self._space: dict[bytes, tuple] = {}     # key → what it shares blocks with others of
        self._space_of: dict[int, tuple] = {}    # block → that of whoever published it
        self._failing = False                    # a failed step is being applied
        self._failed_rows: set[int] = set()      # of the step that is being applied
        for target, name, watch in ((core.kv, "publish", self._on_publish), (core.live, "admit", self._on_admit),
                                    (core.live, "preempt", self._on_preempt), (core.live, "finish", self._on_finish)):
            setattr(target, name, _watched(getattr(target, name), watch))
        core.scheduler.schedule = self._watched_schedule(core.scheduler.schedule)

    # --- as the driver tells ---

    def wished(self, wish: Wish) -> None:
        self.num_requests += 1
        self._space[wish.key] = (wish.cache_salt, None if self.core.config.enable_prefix_caching else wish.key)
        if wish.continues:
            self._boundary.add(wish.key)

    def planned(self, plan: StepPlan) -> None:
        core = self.core
        num_tokens = int(i32_column(plan.num_tokens).sum())
        assert num_tokens <= core.memory.budget <= core.config.max_num_batched_tokens, "budget"
        assert len(core.live.running) <= core.config.max_num_seqs, "rows"
        assert len(core.steps) <= (core.window if core.suspects.on_trial() is None else 1), "window"
        self._just_published = set()

    def applying(self, result: StepResult) -> None:
        self._failing = result.status not in (StepStatus.OK, StepStatus.SKIPPED)
        self._failed_rows = set(self.core.steps[0].rows[i32_column(result.row_errors)[::2]].tolist())
        if not self.core.steps[0].dead and result.epoch == self.core.ready.epoch:
            self._look_ahead(self.core.steps[0], result)
        if self._failing and len(self.core.steps) > 1:
            self.seen.add("failed step with another in flight")
        if result.status is StepStatus.SKIPPED:
            self.seen.add("skipped step")

    def _look_ahead(self, step: Step, result: StepResult) -> None:
        """Which fates drafts and several steps have met."""
        if step.num_drafts is not None and self._failing:
            self.seen.add("drafts in a failed step")
        if self._failing or (step.num_drafts is None and step.num_steps == 1):
            return
        num_out = i32_column(result.num_out)
        tokens = np.split(i32_column(result.token_ids), np.cumsum(num_out)[:-1])
        failed = set(i32_column(result.row_errors)[::2].tolist())
        for at, count in enumerate(num_out.tolist()):
            drafts = 0 if step.num_drafts is None else int(step.num_drafts[at])
            if at in failed or not (drafts or step.num_steps > 1):
                continue
            if drafts:
                self.seen.add("all drafts right" if count == 1 + drafts else "some drafts right" if count > 1 else "no draft right")
            if at in step.departed and step.departed[at].status is RequestStatus.WAITING and count > 1:
                self.seen.add("late tokens behind drafts" if drafts else "late tokens of several steps")
            request = self.core.rows.request[step.rows[at]]
            if request is not None and request.serial == step.serials[at] and request.stop_ids & set(tokens[at][:-1].tolist()):
                self.seen.add("stop id within drafts" if drafts else "stop id within several steps")

    def applied(self) -> None:
        self._failing = False
        self._just_published, self._published_now = self._published_now, set()
        if self.core.kv.pool.num_evicted:
            self.seen.add("eviction of a published block")
        if self.core.suspects.on_trial() is not None:
            self.seen.add("trial of suspects")
        if self.core.memory.row_cap is not None:
            self.seen.add("row bound for want of memory")

    def done(self) -> None:
        assert self.core.live.num_cached_tokens == self.num_cached_tokens, "cached tokens, counted"
        self.reached["steps"] += self.worker.num_run
        self.reached["seeds"] += 1
        self.reached["requests"] += self.num_requests
        self.reached.update(self.seen)

    def _watched_schedule(self, schedule: Any) -> Any:
        def call(limits: StepLimits) -> ScheduledStep:
            core = self.core
            rows = [row for row in core.live.order.tolist() if core.rows.in_flight[row] and core.scheduler.drafts.guesses_at(np.array([row]))]
            scheduled = schedule(limits)
            assert not (scheduled.preempted and scheduled.admitted), "a step that preempted admits nobody"
            sampling = set(scheduled.rows[scheduled.samples.astype(bool)].tolist()) - {r.req_idx for r in scheduled.admitted}
            assert not sampling & set(rows), "one that is guessed at samples while a sample of it is in flight"
            self._check_ahead(scheduled)
            assert limits.only is None or set(self.core.live.running) <= limits.only, "somebody runs beside a trial"
            return scheduled

        return call

    def _check_ahead(self, scheduled: ScheduledStep) -> None:
        """Drafts and several steps are for decodes, from what is free."""
        if scheduled.num_steps > 1:
            assert not len(self.core.live.waiting) and not scheduled.preempted, "several steps while somebody waits"
            assert scheduled.num_drafts is None, "several steps with drafts"
            self.seen.add("several steps in a plan")
            if self.core.steps:
                self.seen.add("several steps with another plan in flight")
        if scheduled.num_drafts is not None:
            assert not scheduled.preempted, "drafts in a step that preempted"
            if (scheduled.num_tokens - scheduled.num_drafts > 1).any():
                self.seen.add("drafts beside a chunk")
        if len(scheduled.rows) and self.core.steps and self.core.clock.next_plan_ns(self.core.steps):
            self.seen.add("a plan that the clock let go")

    # --- before pool, cache and live requests act ---

    def _on_publish(self, request: Request) -> None:
        rows, row, size = self.core.rows, request.req_idx, self.core.kv.block_size
        ready = min(int(rows.num_applied[row]), int(rows.num_tokens[row])) // size
        content = prefixes(rows.tokens[row, :ready * size].tolist())
        for index in range(int(rows.published[row]), ready):
            block_id = int(rows.block_table[row, index])
            assert self.worker.memory[block_id] == content[index * size:(index + 1) * size], "published without its content"
            self._published_now.add(block_id)
            self._space_of[block_id] = self._space[request.key]

    def _on_admit(self, request: Request, hits: list[int], _num_blocks: int) -> None:
        core = self.core
        assert not request.steps_in_flight, "admitted while a step holds it"
        assert len(hits) * core.kv.block_size < request.num_tokens, "a hit on its last token"
        assert not hits or request.params.prompt_logprobs is None, "a hit where prompt logprobs are asked for"
        assert all(self._space_of[block_id] == self._space[request.key] for block_id in hits), "a hit on blocks that are not shared"
        needed = core.kv.blocks_for(request.num_tokens) - len(hits) + core.kv.pool.count_free(hits)
        mark = int(core.config.watermark * core.kv.pool.num_blocks) if core.live.running else 0
        assert core.kv.num_free >= needed + mark, "admitted without room for all its tokens beside the watermark"
        self._check_turn(request)
        if request.num_cached_tokens < 0:
            self.num_cached_tokens += len(hits) * core.kv.block_size
        if self._just_published & set(hits):
            self.seen.add("prefix hit on a block just published")
        if request.key in self._boundary:
            self.seen.add("continuation of a finish on a block boundary")

    def _check_turn(self, request: Request) -> None:
        """Who stands before it had to wait for something else than room."""
        kv, only = self.core.kv, self.core.suspects.on_trial()
        for other in self.core.live.waiting:
            if other is request:
                return
            waits = other.steps_in_flight or (only is not None and other not in only)
            assert waits or kv.is_being_written(other, len(kv.match(other))), "it takes the blocks of one that does not fit"

    def _on_preempt(self, request: Request) -> None:
        core, row = self.core, request.req_idx
        held_back = self._failing or core.suspects.on_trial() is not None
        assert held_back or request is not core.live.first(), "the first is never preempted"
        assert held_back or request is core.live.running[-1], "victims come from the end"
        self.seen.add("preemption")
        if core.rows.steps[row]:
            self.missed = request
        if core.rows.steps[row] and not core.rows.in_flight[row]:
            self.seen.add("chunk in flight of a preempted request")

    def _on_finish(self, request: Request, reason: Finish, _stop_token: int = -1) -> None:
        running = request.status is RequestStatus.RUNNING
        if running and reason in (Finish.STOP, Finish.LENGTH):
            rows, row = self.core.rows, request.req_idx
            confirmed = min(int(rows.num_applied[row]), int(rows.num_tokens[row])) // rows.block_size
            assert rows.published[row] == confirmed or row in self._failed_rows, "an end before its blocks were published"
        steps = int(self.core.rows.steps[request.req_idx]) if running else request.steps_in_flight
        if reason is Finish.ABORT and steps:
            self.seen.add("abort in flight")
        if not running and reason in (Finish.STOP, Finish.LENGTH):
            self.seen.add("finish on a late token")
        if reason not in (Finish.STOP, Finish.LENGTH, Finish.ABORT):
            self.seen.add(f"end by {reason.name}")


def _watched(method: Any, watch: Any) -> Any:
    def call(*arguments: Any, **keywords: Any) -> Any:
        watch(*arguments, **keywords)
        return method(*arguments, **keywords)

    return call
