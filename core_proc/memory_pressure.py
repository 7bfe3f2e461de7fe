"""What to do when steps fail for want of memory: smaller ones, then fewer rows.

Owned by ``EngineCore``.  The budget halves down to one token; then the youngest request
goes and no row comes; a request fails only alone with one token.  After eight good steps
in a row everything is as before.
"""

from __future__ import annotations

RECOVERED_STEPS = 8


class MemoryPressure:
    """``budget`` and ``row_cap`` bound the next step."""

    def __init__(self, budget: int) -> None:
        self._whole = self.budget = budget     # tokens
        self.row_cap: int | None = None        # most running requests; None: no bound of ours
        self._good_steps = 0

    def step_succeeded(self) -> None:
        self._good_steps += 1
        if self._good_steps >= RECOVERED_STEPS:
            self.reset()

    def step_failed(self, num_running: int) -> bool:
        """True if the youngest running request has to go: preempted, or failed if it is alone."""
        self._good_steps = 0
        if self.budget > 1:
            self.budget = max(1, self.budget // 2)
            return False
        self.row_cap = max(1, num_running - 1)
        return True

    def reset(self) -> None:
        self.budget, self.row_cap, self._good_steps = self._whole, None, 0
