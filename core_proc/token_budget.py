"""How many tokens, requests and decode steps a plan may hold, from what steps have cost so far.

Owned by ``EngineCore``, which asks before each plan.  A number that the user gave stands; on
a CPU the default is about 100 ms of work, and ``max_step_ms`` keeps every step below its
bound, as far as the clock can tell.  How a prompt is cut never changes a result.
"""

from __future__ import annotations

from core_proc.step_clock import StepClock
from protocol.config import SchedulerConfig

CUDA_BUDGET = 2048           # tokens
CPU_STEP_US = 100_000        # a step on a CPU, where the user gives no bound
START_TOKENS = 512           # until a chunk has been measured, ...
BOUNDED_START_TOKENS = 64    # ... and where a first step of that many could break the user's bound
MOST_TOKENS = 8192
LEAST_CHUNK = 32             # tokens of prompts in a step, however long it takes, ...
BOUNDED_LEAST_CHUNK = 8      # ... and where the user gave a bound
DECODE_SHARE = 0.75          # of the user's bound that decodes may take; the rest is for prompts


class TokenBudget:
    """``num_tokens``, ``num_rows`` and ``num_steps`` of the next plan."""

    def __init__(self, config: SchedulerConfig, clock: StepClock, on_cuda: bool) -> None:
        self._clock = clock
        self._given = config.max_num_batched_tokens
        self._bound_us = None if config.max_step_ms is None else 1000 * config.max_step_ms
        if self._given is None and self._bound_us is None and on_cuda:
            self._given = CUDA_BUDGET
        self._most_steps = config.max_decode_steps
        self._plan_us = min(1000 * config.max_plan_ms, self._bound_us or float("inf"))
        self._most = MOST_TOKENS if self._given is None else self._given

    def num_tokens(self, num_running: int) -> int:
        """Tokens of a step beside whose prompts ``num_running`` requests may decode."""
        if self._bound_us is None:
            if self._given is not None:
                return self._given
            room_us = max(CPU_STEP_US - self._decodes_us(num_running), CPU_STEP_US / 2)
            chunk = max(LEAST_CHUNK, self._clock.chunks.largest_within(room_us) or START_TOKENS)
        else:
            room_us = self._bound_us - self._decodes_us(num_running)
            chunk = max(BOUNDED_LEAST_CHUNK, self._clock.chunks.largest_within(room_us) or BOUNDED_START_TOKENS)
        return min(_even(num_running, chunk), self._most)

    def num_rows(self) -> int | None:
        """Most running requests, so that all of them get a token in each step; None: no bound of ours."""
        if self._bound_us is None:
            return None
        return max(1, self._clock.decodes.largest_within(DECODE_SHARE * self._bound_us) or 1)

    def num_steps(self, num_running: int) -> int:
        """Most decode steps in one plan: what they gain, a request that arrives meanwhile waits for."""
        if self._most_steps == 1 or not num_running:
            return 1
        step_us = self._clock.decodes.at(num_running)
        return 1 if step_us is None else max(1, min(self._most_steps, int(self._plan_us / step_us)))

    def _decodes_us(self, num_running: int) -> float:
        return self._clock.decodes.at(num_running) or 0.0


def _even(num_running: int, chunk: int) -> int:
    """The sum, cut to a number of tokens that a worker does not have to pad, where that costs little."""
    total = num_running + chunk
    multiple = 8 if total <= 64 else 32 if total <= 512 else 128
    rounded = total // multiple * multiple
    return rounded if 2 * (rounded - num_running) >= chunk else total
