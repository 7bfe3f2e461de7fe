"""The token budget from the measured rate, and a bound on what a step takes."""

import random

import numpy as np
import pytest

from core_harness import Harness
from protocol.codec import i32_column
from protocol.messages import Finish
from protocol.steps import StepStatus

BASE_US, DECODE_US, CHUNK_US = 12_000, 900, 180      # of a step, of a decode, of a token of a prompt
NOISE = 0.1


class Machine:
    """An engine whose worker takes its time by the numbers above; the clock is the worker's."""

    def __init__(self, seed: int = 0, speed: float = 1.0, **config) -> None:
        self.engine = Harness(num_blocks=20_000, max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=None, **config)
        self.rng, self.speed = random.Random(seed), speed
        self.steps: list[tuple[int, int, int]] = []      # tokens, decodes, µs without what disturbed it

    def step(self) -> bool:
        """False when nothing is left."""
        plan = self.engine.plan() or (self.engine.plans[0] if self.engine.plans else None)
        if plan is None:
            return False
        tokens = i32_column(plan.num_tokens)
        decodes = int((tokens == 1).sum())
        noise = self.rng.uniform(1 - NOISE, 1 + NOISE)
        own_us = int(noise * (BASE_US + DECODE_US * decodes + CHUNK_US * (int(tokens.sum()) - decodes)) / self.speed)
        took_us = own_us * (4 if self.rng.random() < 0.03 else 1)
        self.engine.now_ns += 1000 * took_us
        self.engine.answer(took_us=took_us)
        self.steps.append((int(tokens.sum()), decodes, own_us))
        return True

    def run(self) -> None:
        while self.step():
            assert len(self.steps) < 20_000, "does not end"


def chunks_of(steps: list[tuple[int, int, int]], least: int) -> list[int]:
    """Tokens of prompts in the steps that were full."""
    return [tokens - decodes for tokens, decodes, _ in steps if tokens - decodes >= least]


@pytest.mark.parametrize(("speed", "prompt", "expected"), [(1.0, 3_000, 490), (0.2, 600, 40), (6.0, 3_000, 3_270)])
def test_a_step_of_prompts_becomes_100_ms_of_work(speed, prompt, expected):
    """From 512 tokens on, whichever the machine's rate."""
    machine = Machine(speed=speed)
    for number in range(1, 31):
        machine.engine.add(number, prompt, max_tokens=1)
    machine.run()
    assert machine.steps[0][0] == 512
    settled = chunks_of(machine.steps, least=16)[20:-2]
    assert np.median(settled) == pytest.approx(expected, rel=0.25)
    assert min(settled) > 0.5 * np.median(settled) and max(settled) < 1.6 * np.median(settled)


def test_noise_moves_the_budget_little():
    machine = Machine()
    for number in range(1, 31):
        machine.engine.add(number, 3_000, max_tokens=1)
    machine.run()
    settled = chunks_of(machine.steps, least=300)[20:-2]
    assert len(set(settled)) <= 12          # each new number of rows costs the worker a compilation


def test_a_disturbed_step_does_not_shrink_the_budget():
    engine = Harness(num_blocks=20_000, max_model_len=4096, max_num_batched_tokens=None)
    engine.add(1, 3_000, max_tokens=1)
    budgets = []
    for took_us in (100_000, 100_000, 2_000_000, 100_000):
        engine.plan()
        budgets.append(engine.core.memory.budget)
        engine.answer(took_us=took_us)
    assert budgets == [512] * 4


def test_prompts_get_half_a_step_however_many_decode():
    machine = Machine(speed=0.5)            # 64 decodes take 140 ms
    for number in range(1, 65):
        machine.engine.add(number, 8, max_tokens=2_000)
    for _ in range(40):
        machine.step()
    machine.engine.abort(1)
    machine.engine.add(65, 3_000)
    for _ in range(30):
        machine.step()
    assert 80 < np.median(chunks_of(machine.steps, least=16)[5:]) < 300


def test_a_given_number_of_tokens_stands():
    engine = Harness(num_blocks=20_000, max_model_len=4096, max_num_batched_tokens=200)
    engine.add(1, 3_000, max_tokens=1)
    for _ in range(5):
        assert i32_column(engine.plan().num_tokens).sum() == 200
        engine.answer(took_us=1_000)


@pytest.mark.parametrize("bound_ms", [25.0, 60.0])
@pytest.mark.parametrize("seed", range(2))
def test_max_step_ms_bounds_every_step_and_starves_nobody(bound_ms, seed):
    machine = Machine(seed, max_step_ms=bound_ms)
    for number in range(1, 41):
        machine.engine.add(number, 20 + 37 * number % 700, max_tokens=60)
    machine.run()
    over = [own_us for _, _, own_us in machine.steps if own_us > 1.15 * 1000 * bound_ms]
    assert len(over) <= 0.02 * len(machine.steps)        # while it is finding out
    for number in range(1, 41):
        tokens, finish = machine.engine.outputs(number)
        assert (len(tokens), finish) == (60, Finish.LENGTH)
    most = max(decodes for _, decodes, _ in machine.steps)
    assert most >= 0.4 * (0.75 * 1000 * bound_ms - BASE_US) / DECODE_US       # and as many share a step as may


def test_max_step_ms_and_a_number_of_tokens_both_bound():
    machine = Machine(max_step_ms=60.0)
    machine.engine.core.budget._most = 100
    machine.engine.add(1, 2_000, max_tokens=1)
    machine.run()
    assert max(tokens for tokens, _, _ in machine.steps) == 100


def test_every_running_request_is_in_every_step_though_steps_turn_slow():
    """The bound is for admissions and chunks; nobody who runs is left out."""
    machine = Machine(max_step_ms=60.0)
    for number in range(1, 31):
        machine.engine.add(number, 8, max_tokens=300)
    for _ in range(60):
        machine.step()
    machine.speed = 0.1
    for _ in range(10):
        machine.step()
    running = len(machine.engine.core.live.running)
    assert running > 10
    assert [decodes for _, decodes, _ in machine.steps[-5:]] == [running] * 5


def test_memory_pressure_halves_what_the_clock_allows():
    engine = Harness(num_blocks=20_000, max_model_len=4096, max_num_batched_tokens=None)
    engine.add(1, 3_000, max_tokens=1)
    engine.plan()
    engine.answer(StepStatus.FAILED_MEMORY)
    engine.plan()
    assert engine.core.memory.budget == 256
    engine.answer(took_us=10_000)           # the clock would allow 1,024
    assert i32_column(engine.plan().num_tokens).sum() == 256
