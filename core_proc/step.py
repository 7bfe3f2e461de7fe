"""A step: what may be in it, what was decided, what the core remembers until its result comes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from core_proc.request import Request


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What the next step may hold."""

    num_tokens: int                          # budget
    num_rows: int                            # most running requests
    only: frozenset[Request] | None = None   # suspects under trial: nobody else may run
    num_steps: int = 1                       # most decode steps in one plan


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """Entries in the plan's order: decodes first, then prefill chunks."""

    rows: np.ndarray             # intp[R] req_idx
    starts: np.ndarray           # i32[R] tokens computed before
    num_tokens: np.ndarray       # i32[R] in each of ``num_steps``, drafts counted
    samples: np.ndarray          # bool[R]
    grow: np.ndarray             # i32[k, 2] (req_idx, block_id) of requests admitted earlier
    admitted: list[Request]
    preempted: list[Request]
    num_steps: int = 1           # more only where every entry is a plain decode
    num_drafts: np.ndarray | None = None     # i32[R]; None: no drafts at all
    drafts: np.ndarray | None = None         # i32[sum(num_drafts)] entry after entry


@dataclass(slots=True)
class Step:
    """Positional, like plan and result: entry i is row i of the plan."""

    step_id: int
    rows: np.ndarray                 # intp[R] req_idx
    serials: np.ndarray              # i64[R] admission that the row had: another one there now is a stranger
    starts: np.ndarray               # i32[R] tokens computed before
    num_tokens: np.ndarray           # i32[R] tokens of this plan, of all its steps
    samples: np.ndarray              # i32[R] tokens that the row samples, at most
    num_steps: int = 1
    num_drafts: np.ndarray | None = None     # i32[R]
    dead: bool = False               # it, or one before it, failed: its result will be ``skipped``
    shape: tuple[int, int] = (0, 0)  # of one of its steps: tokens of decoding requests, tokens of chunks
    predicted_us: float | None = None                            # by ``StepClock``, as is ``shape``; None: it cannot say
    departed: dict[int, Request] = field(default_factory=dict)   # entry → request that has left its row since

    @property
    def total_tokens(self) -> int:
        """Of all entries and steps, once ``shape`` is known."""
        return self.shape[0] * self.num_steps + self.shape[1]

    @classmethod
    def of(cls, step_id: int, scheduled: ScheduledStep, serials: np.ndarray) -> Step:
        """What to remember of a step that was decided."""
        num_tokens, samples, num_steps = scheduled.num_tokens, scheduled.samples.astype(np.int32), scheduled.num_steps
        if num_steps > 1:
            num_tokens, samples = num_tokens * num_steps, samples * num_steps
        if scheduled.num_drafts is not None:
            samples += scheduled.num_drafts
        return cls(step_id, scheduled.rows, serials, scheduled.starts, num_tokens, samples, num_steps, scheduled.num_drafts)

    def note_departure(self, request: Request) -> None:
        """``request`` is about to leave its row; its late tokens must still find it."""
        for at in (self.serials == request.serial).nonzero()[0].tolist():
            self.departed[at] = request
