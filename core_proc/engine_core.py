"""The core without its sockets: messages and results in, plans and outputs out.

Driven by ``process`` (and by the simulation), which passes the time in; nothing here reads
a clock, a socket or a file.  Epoch and gen stand on everything that comes from the worker;
what carries others is dropped.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from core_proc.admission_check import read_request
from core_proc.block_pool import BlockPool
from core_proc.channel import Channel
from core_proc.delivery import PromptRows, deliver, deliver_again
from core_proc.drafts import DraftSource, NoDrafts
from core_proc.kv_cache_manager import KVCacheManager
from core_proc.live_requests import LiveRequests
from core_proc.memory_pressure import MemoryPressure
from core_proc.ngram_drafts import NgramDrafts
from core_proc.plan_builder import build_plan
from core_proc.request import Request, RequestStatus
from core_proc.request_queue import create_request_queue
from core_proc.request_rows import RequestRows
from core_proc.scheduler import Scheduler, SchedulerInterface
from core_proc.stats import Stats
from core_proc.step import Step, StepLimits
from core_proc.step_clock import StepClock
from core_proc.step_results import BadResult, settle
from core_proc.stop_conditions import check_request
from core_proc.suspects import Suspects
from core_proc.token_budget import TokenBudget
from protocol.codec import i32_column
from protocol.config import SchedulerConfig
from protocol.messages import Abort, Accepted, Add, EngineReady, EventKind, Finish, Rejected, Sync
from protocol.sampling_params import MAX_N, BadRequest
from protocol.steps import StepPlan, StepResult, StepStatus, WorkerReady

log = logging.getLogger(__name__)
LONG_STEP_US = 5_000         # ten times what a result and the next plan take on their way


class EngineCore:
    """One engine, from its worker's handshake on."""

    def __init__(self, config: SchedulerConfig, ready: WorkerReady) -> None:
        self.config, self.ready = config, ready
        self.window = config.window
        self.max_model_len = ready.max_model_len
        self.steps: deque[Step] = deque()                  # in flight
        max_num_seqs = min(config.max_num_seqs, ready.max_num_seqs)
        self.rows = RequestRows(max_num_seqs, ready.max_model_len, config.block_size)
        self.kv = KVCacheManager(BlockPool(ready.num_blocks), self.rows, config.block_size)
        self.live = LiveRequests(self.rows, self.kv, create_request_queue(config.scheduling_policy), self.steps)
        self.suspects = Suspects()
        self.clock = StepClock()
        self.scheduler: SchedulerInterface = Scheduler(self.live, int(config.watermark * ready.num_blocks), self._drafts(config))
        self.budget = TokenBudget(config, self.clock, on_cuda="cuda" in ready.capabilities)
        self.memory = MemoryPressure(self.budget.num_tokens(0))
        self.stats = Stats()
        self.channels: dict[int, Channel] = {}             # by index
        self._by_routing_id: dict[bytes, Channel] = {}
        self._next_channel = 0
        self._step_id = 0
        self._restart_after: int | None = None
        self._nothing_to_plan = False                      # until a message or a result changes something

    def _drafts(self, config: SchedulerConfig) -> DraftSource:
        if config.speculative == "none":
            return NoDrafts()
        return NgramDrafts(self.live, self.clock, config.num_speculative_tokens, config.prompt_lookup_max, config.prompt_lookup_min)

    # --- frontends -------------------------------------------------------------------------

    def connect(self, routing_id: bytes, now_ns: int) -> None:
        """A frontend said Hello."""
        if routing_id in self._by_routing_id:
            return
        channel = Channel(self._next_channel, routing_id, now_ns)
        self._next_channel += 1
        self.channels[channel.index] = self._by_routing_id[routing_id] = channel
        ready = self.ready
        channel.send(EngineReady, now_ns, epoch=ready.epoch, gen=ready.gen, max_model_len=ready.max_model_len,
                     num_blocks=ready.num_blocks, block_size=self.config.block_size, vocab_size=ready.vocab_size,
                     eos_token_ids=ready.eos_token_ids, numerics_fingerprint=ready.numerics_fingerprint,
                     bit_exact=ready.bit_exact)

    def disconnect(self, routing_id: bytes) -> None:
        """A frontend is gone; its streams have no listener."""
        channel = self._by_routing_id.pop(routing_id, None)
        if channel is None:
            return
        del self.channels[channel.index]
        self._nothing_to_plan = False
        for request in channel.streams.values():
            if request.status is not RequestStatus.FINISHED:
                self._end(request, Finish.ABORT)

    def handle(self, routing_id: bytes, message: Any, now_ns: int) -> None:
        """One message of a frontend that has said Hello."""
        channel = self._by_routing_id.get(routing_id)
        if channel is None:
            log.warning("a message from %r, which has not said Hello", routing_id)
            return
        channel.received(message, now_ns)
        self._nothing_to_plan = False
        match message:
            case Add():
                self._add(channel, message, now_ns)
            case Abort():
                self._abort(channel, message)
            case Sync():
                self._sync(channel, message, now_ns)

    def _add(self, channel: Channel, add: Add, now_ns: int) -> None:
        known = channel.streams.get(add.stream)
        if known is not None and (known.key, known.child) == (add.key, add.child):
            return    # sent again after a gap
        try:
            request = read_request(
                add, vocab_size=self.ready.vocab_size, max_model_len=self.max_model_len, num_blocks=self.kv.pool.num_blocks,
                block_size=self.kv.block_size, prefix_caching=self.config.enable_prefix_caching)
            self._check_room(add)
        except BadRequest as error:
            channel.send(Rejected, now_ns, stream=add.stream, code=error.code, field=error.field, message=error.message)
            return
        request.channel = channel
        channel.streams[add.stream] = request
        channel.send(Accepted, now_ns, stream=add.stream)
        request.finish = check_request(request)
        if request.finish is Finish.NONE:
            self.live.add(request)
            return
        request.status = RequestStatus.FINISHED    # a resumed stream that is already complete
        request.stop_token = int(request.token_ids[-1]) if request.finish is Finish.STOP else -1
        channel.outputs([request], now_ns)

    def _check_room(self, add: Add) -> None:
        if self.live.get(add.key, add.child) is not None:
            raise BadRequest("key", "is in use by a live request", "conflict")
        if len(self.live.waiting) >= self.config.max_num_queued_reqs and not add.resubmitted:
            raise BadRequest("prompt", f"{len(self.live.waiting)} requests are waiting;"
                             f" at most max_num_queued_reqs = {self.config.max_num_queued_reqs} may", "queue_full")

    def _abort(self, channel: Channel, abort: Abort) -> None:
        children = range(MAX_N) if abort.child is None else (abort.child,)
        for child in children:
            request = self.live.get(abort.key, child)
            if request is not None and request.channel is channel and request.attach_no == abort.attach_no:
                self._end(request, Finish.ABORT)
                channel.streams.pop(request.stream, None)

    def _sync(self, channel: Channel, sync: Sync, now_ns: int) -> None:
        """Give every stream again from where the frontend has it."""
        pairs = i32_column(sync.have).reshape(-1, 2).tolist()
        for stream, have in pairs:
            request = channel.streams.get(stream)
            if request is not None:
                deliver_again(self.live, channel, request, have, now_ns)
        channel.sync(now_ns)

    def _end(self, request: Request, finish: Finish) -> None:
        self.live.finish(request, finish)
        self.suspects.forget(request)

    # --- the worker ------------------------------------------------------------------------

    def wants_plan(self, now_ns: int) -> bool:
        return self._has_place() and now_ns >= self.clock.next_plan_ns(self.steps)

    @property
    def next_timer_ns(self) -> int | None:
        """When ``wants_plan`` turns true by itself; None: only a message or a result can make it."""
        return self.clock.next_plan_ns(self.steps) if self._has_place() else None

    def _has_place(self) -> bool:
        return len(self.steps) < self._window() and len(self.live) > 0 and not self._nothing_to_plan

    def _window(self) -> int:
        """Steps in flight; one where a second would be without requests that need the result of the first,
        and waiting for that costs little."""
        if self.suspects.on_trial() is not None:
            return 1
        is_long = self.steps and (self.steps[0].predicted_us or 0.0) > LONG_STEP_US
        return 1 if is_long and self.scheduler.some_need_their_samples() else self.window

    def schedule(self, now_ns: int) -> StepPlan | None:
        """The next plan; None if nothing can run before a result comes."""
        only = self.suspects.on_trial()
        if only is not None:    # the others wait without blocks: one that kept them could starve a small pool
            for request in [r for r in self.live.running if r not in only]:
                self._preempted(request, now_ns, moved=False)
        limits = self._limits(only)
        scheduled = self.scheduler.schedule(limits)
        for request in scheduled.preempted:
            self._preempted(request, now_ns)
        if not len(scheduled.rows) and scheduled.preempted:
            scheduled = self.scheduler.schedule(limits)    # with room now
        self._nothing_to_plan = not len(scheduled.rows)
        if self._nothing_to_plan:
            return None
        for request in scheduled.admitted:
            self._event(request, EventKind.ADMITTED, now_ns)
        self._step_id += 1
        step = Step.of(self._step_id, scheduled, self.rows.serial[scheduled.rows])
        plan = build_plan(self.ready.epoch, self.ready.gen, step, scheduled, self.live, self._restart_after)
        self._restart_after = None
        self.clock.planned(step, now_ns, is_oldest=not self.steps)
        self.steps.append(step)
        self.stats.steps_scheduled += 1
        return plan

    def _limits(self, only: frozenset[Request] | None) -> StepLimits:
        num_running = len(self.live.running)
        caps = [cap for cap in (self.memory.row_cap, self.budget.num_rows()) if cap is not None]
        return StepLimits(
            num_tokens=self.memory.bound(self.budget.num_tokens(num_running)), num_rows=min(caps, default=self.rows.max_num_seqs),
            only=only, num_steps=1 if self.suspects.any else self.budget.num_steps(num_running))

    def apply(self, result: StepResult, now_ns: int) -> None:
        """Raises BadResult where the worker and we contradict each other."""
        if (result.epoch, result.gen) != (self.ready.epoch, self.ready.gen):
            return
        if not self.steps or self.steps[0].step_id != result.step_id:
            raise BadResult(f"the result of step {result.step_id} was not the next one due")
        step = self.steps.popleft()
        self._nothing_to_plan = False
        self.clock.ended(now_ns)
        if step.dead:
            if result.status is not StepStatus.SKIPPED:
                raise BadResult(f"step {step.step_id} ran after a failed one")
        elif result.status is StepStatus.OK:
            self._succeeded(step, result, now_ns)
        else:
            self._failed(step, result, now_ns)

    def _succeeded(self, step: Step, result: StepResult, now_ns: int) -> None:
        self.memory.step_succeeded()
        if result.timings_us is not None:
            self.clock.learn(step, int(i32_column(result.timings_us)[-1]))
        outcome = settle(self.live, self.suspects, step, result)
        self.stats.step_done(step, result)
        for request in outcome.first_tokens:
            self._event(request, EventKind.FIRST_TOKEN, now_ns)
        parts: dict[int, PromptRows] = {}
        for request, *part in outcome.prompt_parts:
            if request.channel is not None:
                parts.setdefault(request.channel.index, []).append((request.stream, *part))
        deliver(self.live, self.channels, outcome.rows, outcome.late, outcome.finished, parts, now_ns)

    def _failed(self, step: Step, result: StepResult, now_ns: int) -> None:
        """Everything in flight is dead; the next plan admits all running requests anew."""
        if result.status not in (StepStatus.FAILED_MEMORY, StepStatus.FAILED_INTERNAL):
            raise BadResult(f"step {step.step_id}: {result.status.name}: {result.detail}")
        log.warning("step %d failed: %s: %s", step.step_id, result.status.name, result.detail)
        self.stats.steps_failed += 1
        culprits = self._carried_further(step)
        for other in self.steps:
            other.dead, other.predicted_us = True, 0.0
        self.live.forget_steps()
        self._restart_after = step.step_id
        if result.status is StepStatus.FAILED_INTERNAL:
            convicted = self.suspects.step_failed(culprits)
            if convicted is not None:
                self._end_and_tell(convicted, Finish.CONVICTED, now_ns)
        elif self.memory.step_failed(len(self.live.running)) and self.live.running:
            youngest = self.live.running[-1]
            if len(self.live.running) > 1:
                self._preempted(youngest, now_ns, moved=False)
            elif step.serials.tolist() == [youngest.serial]:
                self._end_and_tell(youngest, Finish.MEMORY, now_ns)
                self.memory.reset()

    def _carried_further(self, step: Step) -> list[Request]:
        """Running requests that the step would have brought beyond their furthest."""
        rows = self.rows
        here = rows.serial[step.rows] == step.serials
        further = here & (rows.num_applied[step.rows] + step.num_tokens > rows.highest[step.rows])
        return [rows.request[row] for row in step.rows[further]]

    def _end_and_tell(self, request: Request, finish: Finish, now_ns: int) -> None:
        self._end(request, finish)
        if request.channel is not None:
            request.channel.outputs([request], now_ns)

    def _preempted(self, request: Request, now_ns: int, moved: bool = True) -> None:
        if not moved:
            self.live.preempt(request)
        self.stats.preemptions += 1
        self._event(request, EventKind.PREEMPTED, now_ns)

    def _event(self, request: Request, kind: EventKind, now_ns: int) -> None:
        if request.channel is not None:
            request.channel.event(request, kind, now_ns)

    # --- out -------------------------------------------------------------------------------

    def take_outputs(self) -> list[tuple[bytes, Any]]:
        """(routing id, message), in order."""
        taken = []
        for channel in self.channels.values():
            if channel.outbox:
                taken += [(channel.routing_id, message) for message in channel.outbox]
                channel.outbox = []
        return taken

    def tick(self, now_ns: int) -> None:
        """Once a second."""
        for channel in self.channels.values():
            channel.tick(now_ns)
