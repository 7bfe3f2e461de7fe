"""What the core counts, for its progress page and the log.

Owned by ``EngineCore``.
"""

from __future__ import annotations

from dataclasses import dataclass

from core_proc.step import Step
from protocol.steps import StepResult


@dataclass(slots=True)
class Stats:
    """Since the core's start."""

    steps_scheduled: int = 0
    steps_done: int = 0
    steps_failed: int = 0
    tokens: int = 0              # sampled
    computed_tokens: int = 0
    preemptions: int = 0

    def step_done(self, step: Step, result: StepResult) -> None:
        self.steps_done += 1
        self.tokens += len(result.token_ids) // 4
        self.computed_tokens += int(step.num_tokens.sum())
