"""One simulated life of a core: random requests, a worker that fails, frames that get lost."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import msgspec

from core_proc.engine_core import EngineCore
from protocol.messages import Finish, Heartbeat, to_frontend
from protocol.messages import to_core as from_frontend
from protocol.steps import Hello, StepResult, WorkerReady, to_core, to_worker
from simulation.arrivals import Arrivals
from simulation.fake_frontend import FakeFrontend, Stream
from simulation.fake_worker import FakeWorker
from simulation.faults import Faults
from simulation.invariants import check, check_end
from simulation.observer import Observer
from simulation.oracle import install
from simulation.reference import VOCAB, Wish
from simulation.verdict import judge
from simulation.world import BLOCK, World, draw_world

EPOCH, GEN = 3, 5
NUM_FRONTENDS = 2
MAX_TURNS = 8000
MAX_SILENT_SECONDS = 60                  # with somebody alive; lost heartbeats take their time
FORGOTTEN_S = 65                         # after them the core keeps nothing of streams that have ended
SECOND_NS = 1_000_000_000


class Simulation:
    """``run`` until every stream has ended; raises where anything is not as it must be."""

    def __init__(self, seed: int, reached: Counter[str] | None = None, world: World | None = None) -> None:
        self.rng = random.Random(seed)
        self.world = world = world or draw_world(self.rng)
        config = world.config
        self.core = EngineCore(config, WorkerReady(EPOCH, GEN, "f", world.num_blocks, config.max_num_seqs, VOCAB, b"", [], world.max_model_len))
        self.faults = Faults(self.rng, world)
        self.worker = FakeWorker(world.num_blocks, BLOCK, config.max_num_seqs, self.faults)
        install(self.core, self.rng)
        self.observer = Observer(self.core, self.worker, Counter() if reached is None else reached)
        self.arrivals = Arrivals(self.rng, world)
        self.plans: deque[bytes] = deque()       # in the worker's inbox
        self.results: deque[bytes] = deque()     # on the way back
        self.frontends: list[FakeFrontend] = []
        self.open: list[tuple[FakeFrontend, Stream]] = []
        self.now_ns, self.num_streams, self.num_frontends = SECOND_NS, 0, 0
        self.next_tick_ns = 2 * SECOND_NS
        self.lazy = False                        # the core would have planned, had it been asked
        for _ in range(NUM_FRONTENDS):
            self._new_frontend()

    def run(self) -> None:
        silent_s = 0
        for _ in range(MAX_TURNS):
            self._pass(self.rng.choice([1, 1, 3000 * self.world.token_us]) if self.world.token_us else 1)
            moved = self._clients(silent_s == 0) | self._carry() | self._schedule() | self._work() | self._apply()
            self._hear()
            silent_s = 0 if moved else silent_s
            if moved or self._busy():
                continue
            if not self._wants_more() and not self.open and not len(self.core.live):
                return self._finish()
            silent_s += 1
            assert silent_s < MAX_SILENT_SECONDS or not (self.open or len(self.core.live)), self._stuck()
            self._second()
        raise AssertionError("does not end")

    def submit(self, wishes: list[Wish], frontend: FakeFrontend | None = None) -> list[Stream]:
        """As a client of a frontend."""
        frontend = frontend or self.rng.choice(self.frontends)
        arrival_ns = self.now_ns - self.rng.choice([0, 0, 0, 40])     # some were on their way for longer
        streams = []
        for wish in wishes:
            self.num_streams += 1
            self.faults.arrives(wish)
            self.observer.wished(wish)
            streams.append(Stream(wish, self.num_streams, arrival_ns))
            self.open.append((frontend, streams[-1]))
            frontend.add(streams[-1])
        return streams

    # --- the turns of the others ---

    def _clients(self, may_give_up: bool) -> bool:
        """``may_give_up``: only while something moves, or an abort would save what is stuck."""
        rng, world = self.rng, self.world
        moved = False
        if self._wants_more() and rng.random() < world.arrive:
            self.submit(self.arrivals.draw())
            moved = True
        if may_give_up and self.open and (rng.random() < world.abort or (world.abort and self._is_tempting())):
            self._abort(*rng.choice(self.open))
            moved = True
        if may_give_up and rng.random() < world.leave:
            self._leave(rng.choice(self.frontends))
            moved = True
        return moved

    def _is_tempting(self) -> bool:
        """Room now could make the core re-admit a request that steps still hold."""
        missed, self.observer.missed = self.observer.missed, None
        return missed is not None and self.rng.random() < 0.7

    def _wants_more(self) -> bool:
        world, num_open = self.world, len(self.open)
        if self.observer.num_requests < world.num_requests:
            return num_open < world.most_open
        return self.worker.num_run < world.num_steps and not num_open

    def _abort(self, frontend: FakeFrontend, stream: Stream) -> None:
        if stream.attach_no and self.rng.random() < 0.3:
            frontend.abort_as_older_attach(stream)
            return
        alone = self.rng.random() < 0.5
        ended = frontend.abort(stream, all_children=not alone)
        self.open = [(f, s) for f, s in self.open if s not in ended]
        if self.rng.random() < 0.3:     # while steps of the old one may be under way
            self.submit([self.arrivals.again(stream.wish)], frontend)

    def _leave(self, frontend: FakeFrontend) -> None:
        self.core.disconnect(frontend.routing_id)
        check(self.core)
        self.frontends.remove(frontend)
        self.open = [(f, s) for f, s in self.open if f is not frontend]
        self._new_frontend()

    def _new_frontend(self) -> None:
        self.num_frontends += 1
        self.frontends.append(FakeFrontend(b"f0.e%d" % self.num_frontends, self.rng, self.world.loss))

    def _second(self) -> None:
        """Nothing has moved: heartbeats show what was lost."""
        self._pass(SECOND_NS)

    def _pass(self, time_ns: int) -> None:
        """Time passes; everybody ticks once a second."""
        self.now_ns += time_ns
        if self.now_ns < self.next_tick_ns:
            return
        self.next_tick_ns = self.now_ns + SECOND_NS
        self.core.tick(self.now_ns)
        for frontend in self.frontends:
            frontend.tick()

    # --- frames, plans, results ---

    def _carry(self) -> bool:
        """Frames to the core; a heartbeat moves nothing."""
        moved = False
        for frontend in self.frontends:
            if frontend.link.to_core.frames and self.rng.random() < self.world.carry:
                messages = [from_frontend.decode(frame) for frame in frontend.link.to_core.take()]
                for message in messages:
                    self._handle(frontend.routing_id, message)
                moved |= any(not isinstance(message, Heartbeat) for message in messages)
                check(self.core)
        return moved

    def _handle(self, routing_id: bytes, message: Any) -> None:
        if isinstance(message, Hello):
            self.core.connect(message.routing_id, self.now_ns)
        else:
            self.core.handle(routing_id, message, self.now_ns)

    def _schedule(self) -> bool:
        moved = False
        self.lazy = False
        while self.core.wants_plan(self.now_ns):
            if self.rng.random() > self.world.schedule:
                self.lazy = True
                break
            plan = self.core.schedule(self.now_ns)
            check(self.core)
            if plan is None:
                break
            self.observer.planned(plan)
            self.plans.append(to_worker.encode(plan))
            moved = True
        return moved

    def _work(self) -> bool:
        if not self.plans or self.rng.random() > self.world.work:
            return False
        self.results.append(to_core.encode(self.worker.run(to_worker.decode(self.plans.popleft()))))
        return True

    def _apply(self) -> bool:
        if not self.results or self.rng.random() > self.world.apply:
            return False
        result: StepResult = to_core.decode(self.results.popleft())
        if self.rng.random() < 0.02:     # of a worker or for a core that is no more
            self.core.apply(msgspec.structs.replace(result, **self.rng.choice([{"epoch": EPOCH - 1}, {"gen": GEN - 1}])), self.now_ns)
        self.observer.applying(result)
        self.core.apply(result, self.now_ns)
        self.observer.applied()
        check(self.core)
        return True

    def _hear(self) -> None:
        by_id = {frontend.routing_id: frontend for frontend in self.frontends}
        for routing_id, message in self.core.take_outputs():
            by_id[routing_id].link.to_frontend.put(to_frontend.encode(message))
        for frontend in self.frontends:
            if frontend.link.to_frontend.frames and self.rng.random() < self.world.carry:
                frontend.hear()
        ended = [(frontend, stream) for frontend, stream in self.open if not stream.is_open]
        if not ended:
            return
        self.open = [entry for entry in self.open if entry[1].is_open]
        for frontend, stream in ended:
            judge(stream, self.world, self.faults)
            if stream.finish in (Finish.STOP, Finish.LENGTH) and self.observer.num_requests < self.world.num_requests:
                follow = self.arrivals.next_turn(stream.wish, list(stream.token_ids))
                if follow is not None:
                    self.submit([follow], frontend)

    # --- the end ---

    def _busy(self) -> bool:
        """Something is under way, or the core has not been asked."""
        frames = any(f.link.to_core.frames or f.link.to_frontend.frames for f in self.frontends)
        return bool(frames or self.plans or self.results or self.lazy)

    def _stuck(self) -> str:
        live = self.core.live
        return f"stuck: {len(live.running)} running, {len(live.waiting)} waiting, {len(self.open)} open streams"

    def _finish(self) -> None:
        for _ in range(FORGOTTEN_S):
            if not any(channel.streams for channel in self.core.channels.values()):
                break
            self._second()
            self._carry()
            self._hear()
        check_end(self.core)
        assert self.observer.num_requests >= self.world.num_requests and self.worker.num_run >= self.world.num_steps, "a short life"
        self.observer.done()
