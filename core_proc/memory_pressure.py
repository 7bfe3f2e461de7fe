"""What to do when steps fail for want of memory: smaller ones, then fewer rows.

Owned by ``EngineCore``.  The budget halves down to one token; then the youngest request
goes and no row comes; a request fails only alone with one token.  After eight good steps
in a row nothing is bounded any more.
"""

from __future__ import annotations

RECOVERED_STEPS = 8


class MemoryPressure:
    """``budget`` and ``row_cap`` bound the next step."""

    def __init__(self, budget: int) -> None:
        self._whole = self.budget = budget     # tokens: what is wanted, and what a step gets
        self._most: int | None = None          # tokens under pressure; None: no bound of ours
        self.row_cap: int | None = None        # most running requests; None: no bound of ours
        self._good_steps = 0

    def bound(self, budget: int) -> int:
        """What a step that is to have ``budget`` tokens gets."""
        self._whole = budget
        self.budget = budget if self._most is None else min(budget, self._most)
        return self.budget

    def step_succeeded(self) -> None:
        self._good_steps += 1
        if self._good_steps >= RECOVERED_STEPS:
            self.reset()

    def step_failed(self, num_running: int) -> bool:
        """True if the youngest running request has to go: preempted, or failed if it is alone."""
        self._good_steps = 0
        if self.budget > 1:
            self.budget = self._most = self.budget // 2
            return False
        self.row_cap = max(1, num_running - 1)
        return True

    def reset(self) -> None:
        self.budget, self._most, self.row_cap, self._good_steps = self._whole, None, None, 0
