"""Guesses at what requests say next, which the worker checks in the step that they ride in.

What the scheduler asks of whoever guesses.  A guess decides how many tokens a step brings,
never which: the worker samples each position as ever and drops what it finds wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from core_proc.step import ScheduledStep, StepLimits


class DraftSource(ABC):
    """Owned by the scheduler."""

    @abstractmethod
    def hold(self, rows: np.ndarray, held: np.ndarray) -> None:
        """Set ``held`` (bool, of each of ``rows``) where a sample is under way and a guess needs it:
        the row does not sample again before its result."""

    @abstractmethod
    def guesses_at(self, rows: np.ndarray) -> bool:
        """Whether some of ``rows`` are to be guessed at, now or when their newest token is known."""

    @abstractmethod
    def add_to(self, step: ScheduledStep, limits: StepLimits) -> ScheduledStep:
        """``step``, which has been counted, with drafts behind its decodes; these are counted here."""


class NoDrafts(DraftSource):
    """Nobody guesses."""

    def hold(self, rows: np.ndarray, held: np.ndarray) -> None:
        pass

    def guesses_at(self, rows: np.ndarray) -> bool:
        return False

    def add_to(self, step: ScheduledStep, limits: StepLimits) -> ScheduledStep:
        return step
