"""What the core counts, for its progress page and the log.

Owned by ``EngineCore``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core_proc.step import Step
from protocol.codec import i32_column
from protocol.steps import StepResult


@dataclass(slots=True)
class Stats:
    """Since the core's start."""

    steps_scheduled: int = 0
    steps_done: int = 0
    steps_failed: int = 0
    tokens: int = 0              # sampled
    computed_tokens: int = 0
    draft_tokens: int = 0        # guessed, ...
    accepted_tokens: int = 0     # ... and right
    preemptions: int = 0

    def step_done(self, step: Step, result: StepResult) -> None:
        self.steps_done += 1
        self.tokens += len(result.token_ids) // 4
        self.computed_tokens += step.total_tokens
        if step.num_drafts is not None:
            guessed = step.num_drafts > 0
            self.draft_tokens += int(step.num_drafts.sum())
            self.accepted_tokens += int(np.maximum(i32_column(result.num_out)[guessed] - 1, 0).sum())
