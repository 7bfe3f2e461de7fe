"""What the core remembers of a plan until its result comes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from core_proc.request import Request


@dataclass(slots=True)
class Step:
    """Positional, like plan and result: entry i is row i of the plan."""

    step_id: int
    rows: np.ndarray                 # i32[R] req_idx
    serials: np.ndarray              # i64[R] admission that the row had: another one there now is a stranger
    starts: np.ndarray               # i32[R] tokens computed before
    num_tokens: np.ndarray           # i32[R] tokens of this step
    samples: np.ndarray              # bool[R]
    dead: bool = False               # it, or one before it, failed: its result will be ``skipped``
    shape: tuple[int, int] = (0, 0)  # tokens of decoding requests, tokens of chunks
    predicted_us: float | None = None                            # by ``StepClock``, as is ``shape``; None: it cannot say
    departed: dict[int, Request] = field(default_factory=dict)   # entry → request that has left its row since

    def note_departure(self, request: Request) -> None:
        """``request`` is about to leave its row; its late token must still find it."""
        at = np.flatnonzero((self.rows == request.req_idx) & (self.serials == request.serial))
        if at.size:
            self.departed[int(at[0])] = request
