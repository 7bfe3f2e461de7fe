"""The EngineCore process: one loop over three sources, asleep between events.

Started by launch.py.  Owns the sockets, the lifeline and the progress page; every decision
is ``EngineCore``'s.  A frontend's full queue never blocks the loop: its frames wait here.
"""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections import deque
from typing import Any

import zmq

from core_proc.engine_core import EngineCore
from core_proc.step_results import BadResult
from protocol.child import ChildContext, start_child
from protocol.codec import PROTOCOL_VERSION, ColumnError, Reject, Unsupported
from protocol.messages import Drain
from protocol.messages import to_core as from_frontend
from protocol.messages import to_frontend
from protocol.progress import State
from protocol.steps import Hello, StepResult, WorkerReady, to_worker
from protocol.steps import to_core as from_worker
from protocol.transport import Peers, Sent, new_context

log = logging.getLogger(__name__)
TURN_MESSAGES = 64           # most messages taken from the frontends in one turn ...
TURN_NS = 1_000_000          # ... and no further one after this long
TICK_S = 1.0
RETRY_S = 0.01               # a full queue is offered its frames again
EXIT_BUG = 1


class CoreProcess:
    """Sockets and timers."""

    def __init__(self, context: ChildContext) -> None:
        self.context, self.page = context, context.page
        zmq_context = new_context()
        self.frontends = Peers(zmq_context, context.run_dir.core_socket)
        self.workers = Peers(zmq_context, context.run_dir.worker_socket)
        self.core: EngineCore | None = None              # None until the worker is ready
        self.worker_id: bytes | None = None
        self.early: list[bytes] = []                     # frontends that said Hello before that
        self.unsent: dict[bytes, deque[bytes]] = {}      # frames that a full queue refused
        self.unsent_plans: deque[bytes] = deque()
        self.next_tick_s = time.monotonic() + TICK_S

    def run(self) -> int:
        """The exit code, once the parent says so or is gone."""
        poller = zmq.Poller()
        for source in (self.frontends.socket, self.workers.socket, self.context.lifeline.fd):
            poller.register(source, zmq.POLLIN)
        self.page.set("state", State.READY)
        while True:
            poller.poll(self._sleep_ms())
            if any(isinstance(m, Drain) for m in self.context.lifeline.receive()) or self.context.lifeline.parent_gone:
                return 0
            if not self._from_workers():
                return EXIT_BUG
            self._from_frontends()
            self._send_plans()
            self._tick()
            self._send_outputs()

    def _sleep_ms(self) -> int:
        """Until the next timer at most; rounded up, for a timer that is not yet due would be asked again and again."""
        waits = bool(self.unsent or self.unsent_plans)
        sleep_s = min(self.next_tick_s - time.monotonic(), RETRY_S if waits else TICK_S)
        timer_ns = None if self.core is None else self.core.next_timer_ns
        if timer_ns is not None:
            sleep_s = min(sleep_s, (timer_ns - time.time_ns()) / 1e9)
        return max(0, math.ceil(1000 * sleep_s))

    def close(self) -> None:
        self.frontends.close()
        self.workers.close()

    def _from_frontends(self) -> None:
        until_ns = time.monotonic_ns() + TURN_NS
        for _ in range(TURN_MESSAGES):
            frames = self.frontends.receive(limit=1)
            if not frames:
                return
            routing_id, frame = frames[0]
            message = from_frontend.decode(frame)
            if isinstance(message, (Reject, Unsupported)):
                log.warning("a frame from %r was not understood: %s", routing_id, message)
            elif isinstance(message, Hello):
                self._greeted(routing_id, message)
            elif self.core is not None:
                try:
                    self.core.handle(routing_id, message, time.time_ns())
                except ColumnError as error:
                    log.warning("a message from %r: %s", routing_id, error)
            if time.monotonic_ns() > until_ns:
                return

    def _greeted(self, routing_id: bytes, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            log.error("%r speaks protocol %d, this core %d", routing_id, hello.protocol_version, PROTOCOL_VERSION)
        elif self.core is None:
            self.early.append(routing_id)
        else:
            self.core.connect(routing_id, time.time_ns())

    def _from_workers(self) -> bool:
        """False after a bug of ours, which ends the core."""
        for routing_id, frame in self.workers.receive():
            message = from_worker.decode(frame)
            match message:
                case Hello():
                    self.worker_id = routing_id
                    own = Hello(PROTOCOL_VERSION, "core", self.context.routing_id, self.context.epoch)
                    self.workers.send(routing_id, to_worker.encode(own))
                case WorkerReady():
                    self._worker_ready(message)
                case StepResult():
                    try:
                        self.core.apply(message, time.time_ns())
                    except (BadResult, ColumnError) as error:
                        log.error("core and worker contradict each other: %s", error)
                        self.page.set_text("error", str(error))
                        return False
                case Reject() | Unsupported():
                    log.warning("a frame from the worker was not understood: %s", message)
        return True

    def _worker_ready(self, ready: WorkerReady) -> None:
        if ready.epoch != self.context.epoch or self.core is not None:
            return
        self.core = EngineCore(self.context.config.scheduler, ready)
        self.page.set("blocks", ready.num_blocks)
        self.page.set("max_model_len", ready.max_model_len)
        self.page.set_text("fingerprint", ready.numerics_fingerprint)
        for routing_id in self.early:
            self.core.connect(routing_id, time.time_ns())
        self.early.clear()
        gc.collect()
        gc.freeze()

    def _send_plans(self) -> None:
        while self.core is not None and self.core.wants_plan(time.time_ns()):
            plan = self.core.schedule(time.time_ns())
            if plan is None:
                break
            self.page.add("steps_started")
            self.unsent_plans.append(to_worker.encode(plan))
        while self.unsent_plans and self.workers.send(self.worker_id, self.unsent_plans[0]) is Sent.OK:
            self.unsent_plans.popleft()

    def _send_outputs(self) -> None:
        if self.core is None:
            return
        for routing_id, message in self.core.take_outputs():
            self.unsent.setdefault(routing_id, deque()).append(to_frontend.encode(message))
        for routing_id, frames in list(self.unsent.items()):
            outcome = Sent.OK
            while frames and outcome is Sent.OK:
                outcome = self.frontends.send(routing_id, frames[0])
                if outcome is Sent.OK:
                    frames.popleft()
            if outcome is Sent.GONE:
                self.core.disconnect(routing_id)
            if not frames or outcome is Sent.GONE:
                del self.unsent[routing_id]

    def _tick(self) -> None:
        now_s = time.monotonic()
        if self.core is not None:
            self._show(self.core)
        if now_s < self.next_tick_s:
            return
        self.next_tick_s = now_s + TICK_S
        self.page.add("ticks")
        if self.core is not None:
            self.core.tick(time.time_ns())

    def _show(self, core: EngineCore) -> None:
        stats = core.stats
        values: dict[str, Any] = {
            "running": len(core.live.running), "waiting": len(core.live.waiting),
            "used_blocks": core.kv.pool.num_blocks - core.kv.num_free, "steps_done": stats.steps_done,
            "tokens": stats.tokens, "computed_tokens": stats.computed_tokens, "cached_tokens": core.live.num_cached_tokens,
            "preemptions": stats.preemptions, "draft_tokens": stats.draft_tokens, "accepted_tokens": stats.accepted_tokens}
        for name, value in values.items():
            self.page.set(name, value)


def main() -> int:
    process = CoreProcess(start_child("core"))
    try:
        return process.run()
    finally:
        process.close()


if __name__ == "__main__":
    sys.exit(main())
