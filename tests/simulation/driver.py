"""One simulated life of a core: random requests, a worker that fails, messages that get lost."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, replace

import msgspec

from core_proc.engine_core import EngineCore
from protocol.config import SchedulerConfig
from protocol.messages import Finish, to_frontend
from protocol.messages import to_core as from_frontend
from protocol.steps import StepStatus, WorkerReady, to_core, to_worker
from simulation.fake_frontend import FakeFrontend
from simulation.fake_worker import FakeWorker
from simulation.invariants import check
from simulation.observer import Observer
from simulation.reference import VOCAB, Wish

FRONTEND = b"f0.e1"
BLOCK = 4                    # tokens
MAX_EVENTS = 6000
SECOND_NS = 1_000_000_000
NUM_REQUESTS = 26            # and what continues them


@dataclass
class World:
    """What is drawn once for each seed."""

    num_blocks: int
    max_model_len: int
    loss_rate: float
    fail_rate: float
    row_error_rate: float
    abort_rate: float
    config: SchedulerConfig


def draw_world(rng: random.Random) -> World:
    config = SchedulerConfig(
        max_num_seqs=rng.randint(2, 6), max_num_batched_tokens=rng.choice([1, 3, 6, 10, 16, 32]), window=rng.choice([1, 2, 2]),
        scheduling_policy=rng.choice(["fcfs", "priority"]), enable_prefix_caching=rng.random() < 0.75,
        watermark=rng.choice([0.0, 0.0, 0.1]))
    msgspec.structs.force_setattr(config, "block_size", BLOCK)
    return World(
        num_blocks=rng.randint(7, 22), max_model_len=rng.choice([24, 40, 60]), loss_rate=rng.choice([0, 0, 0.02]),
        fail_rate=rng.choice([0, 0.03, 0.08]), row_error_rate=rng.choice([0, 0.01]), abort_rate=rng.choice([0, 0.01, 0.04]),
        config=config)


class Simulation:
    """``run`` until every stream has ended; raises where anything is not as it must be."""

    def __init__(self, seed: int, reached: Counter[str] | None = None) -> None:
        self.rng = random.Random(seed)
        self.world = world = draw_world(self.rng)
        ready = WorkerReady(1, 1, "f", world.num_blocks, world.config.max_num_seqs, VOCAB, b"", [], world.max_model_len)
        self.core = EngineCore(world.config, ready)
        self.worker = FakeWorker(world.num_blocks, BLOCK, world.config.max_num_seqs, self.rng, world.fail_rate, world.row_error_rate)
        self.frontend = FakeFrontend(self.rng, world.loss_rate)
        self.observer = Observer(self.core, reached if reached is not None else Counter())
        self.plans: deque[bytes] = deque()       # in the worker's inbox
        self.results: deque[bytes] = deque()     # on the way back
        self.open: dict[int, Wish] = {}
        self.shared = [[self.rng.randrange(VOCAB) for _ in range(24)] for _ in range(3)]
        self.now_ns, self.next_number, self.steps = 1, 0, 0
        self.core.connect(FRONTEND, self.now_ns)

    def run(self) -> None:
        left = NUM_REQUESTS
        quiet = 0
        for _ in range(MAX_EVENTS):
            self.now_ns += 1
            if left and self.rng.random() < 0.25:
                left -= self._arrive()
            if self.open and self.rng.random() < self.world.abort_rate:
                self._abort(self.rng.choice(list(self.open.values())))
            moved = self._schedule() | self._work() | self._apply()
            quiet = 0 if moved else quiet + 1
            check(self.core)
            self._deliver()
            if quiet > 3:        # nothing moves: let a second pass, heartbeats show what was lost
                self.now_ns += SECOND_NS
                self.core.tick(self.now_ns)
                self._deliver()
                self._tell(self.frontend.heartbeat())
            if not left and not self.open and not len(self.core.live):
                return self._finish()
            assert quiet < 60, f"stuck with {len(self.core.live.running)} running and {len(self.core.live.waiting)} waiting"
        raise AssertionError("does not end")

    # --- requests ---

    def _arrive(self) -> int:
        """One request with its children; how many requests that is."""
        wish = self._wish()
        children = self.rng.randint(2, 4) if self.rng.random() < 0.12 else 1
        for child in range(children):
            self._submit(replace(wish, child=child, seed=wish.seed + child))
        return 1

    def _wish(self) -> Wish:
        rng = self.rng
        self.next_number += 1
        prompt = rng.choice(self.shared)[:rng.randint(0, 20)] + [rng.randrange(VOCAB) for _ in range(rng.randint(0, 6))]
        max_tokens = rng.randint(1, 14)
        return Wish(self.next_number, 0, prompt or [rng.randrange(VOCAB)], max_tokens, rng.randrange(2**40),
                    frozenset(rng.sample(range(VOCAB), rng.choice([0, 1, 2, 12]))), min_tokens=rng.choice([0, 0, min(3, max_tokens)]),
                    priority=rng.choice([0, 0, 0, -1, 2]), final=rng.random() < 0.2, interval=rng.choice([1, 1, 3]))

    def _submit(self, wish: Wish) -> None:
        if self.rng.random() < 0.1:       # resumed: a part of its output, or all of it, is already there
            expected = wish.expected()
            wish.forced = expected[:self.rng.randint(0, len(expected))]
        self.open[wish.stream] = wish
        self._tell(self.frontend.add(wish, self.now_ns))

    def _continue(self, wish: Wish) -> None:
        """The next turn of a conversation: what was said is prompt now."""
        said = wish.prompt + self.frontend.tokens[wish.stream]
        if wish.child or self.rng.random() > 0.5 or len(said) + 8 > self.world.max_model_len:
            return
        follow = replace(self._wish(), prompt=said + [self.rng.randrange(VOCAB)], max_tokens=self.rng.randint(1, 6))
        follow.min_tokens = min(follow.min_tokens, follow.max_tokens)
        follow.continues = len(said) % BLOCK == 0
        self.observer.continues(follow)
        self._submit(follow)

    def _abort(self, wish: Wish) -> None:
        self.observer.aborting(wish)
        self._tell(self.frontend.abort(wish))
        del self.open[wish.stream]

    # --- events ---

    def _schedule(self) -> bool:
        moved = False
        while self.core.wants_plan() and (plan := self.core.schedule(self.now_ns)) is not None:
            self.observer.planned(plan, self.world)
            self.plans.append(to_worker.encode(plan))
            self.steps += 1
            moved = True
        return moved

    def _work(self) -> bool:
        if not self.plans or self.rng.random() < 0.3:
            return False
        result = self.worker.run(to_worker.decode(self.plans.popleft()))
        self.results.append(to_core.encode(result))
        return True

    def _apply(self) -> bool:
        if not self.results or self.rng.random() < 0.3:
            return bool(self.results)
        result = to_core.decode(self.results.popleft())
        if result.status not in (StepStatus.OK, StepStatus.SKIPPED):
            self.observer.failed()
        self.core.apply(result, self.now_ns)
        self.observer.applied()
        return True

    def _deliver(self) -> None:
        for routing_id, message in self.core.take_outputs():
            assert routing_id == FRONTEND
            for answer in self.frontend.receive(to_frontend.encode(message), self.now_ns):
                self._tell(answer)
        for stream, wish in list(self.open.items()):
            if stream in self.frontend.finish or stream in self.frontend.rejected:
                del self.open[stream]
                self._judge(wish)
                if self.frontend.finish.get(stream) in (Finish.STOP, Finish.LENGTH):
                    self._continue(wish)

    def _tell(self, frame: bytes) -> None:
        self.core.handle(FRONTEND, from_frontend.decode(frame), self.now_ns)

    # --- verdicts ---

    def _judge(self, wish: Wish) -> None:
        """Equal to the reference, as far as it came."""
        tokens, expected = self.frontend.tokens[wish.stream], wish.expected()
        if wish.stream in self.frontend.rejected:
            length = len(wish.prompt) + wish.max_tokens
            too_long = length > self.world.max_model_len or -(-(length - 1) // BLOCK) > self.world.num_blocks
            assert too_long, f"refused: {self.frontend.rejected[wish.stream]}"
            return
        finish = self.frontend.finish[wish.stream]
        if finish in (Finish.STOP, Finish.LENGTH):
            assert tokens == expected, f"stream {wish.stream}: {tokens} instead of {expected}"
            stopped = expected[-1] in wish.stop_ids and len(expected) >= wish.min_tokens
            assert finish is (Finish.STOP if stopped else Finish.LENGTH)
        else:
            assert finish in (Finish.ROW_ERROR, Finish.MEMORY, Finish.CONVICTED), finish
            assert tokens == expected[:len(tokens)], "what came before the error"
            assert self.world.row_error_rate or self.world.fail_rate, f"{finish.name} without a cause"

    def _finish(self) -> None:
        for _ in range(20):      # results of streams that were aborted
            self._work()
            self._apply()
        check(self.core)
        assert self.core.kv.num_free == self.world.num_blocks, "a block was leaked"
        self.observer.done(self.steps)
