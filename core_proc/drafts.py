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
    def speculating(self, rows: np.ndarray) -> np.ndarray | bool:
        """Which of the running ``rows`` are to be guessed at: a guess needs the newest token, so they do
        not sample while an earlier sample of theirs is under way."""

    @abstractmethod
    def add_to(self, step: ScheduledStep, limits: StepLimits) -> ScheduledStep:
        """``step``, which has been counted, with drafts behind its decodes; these are counted here."""


class NoDrafts(DraftSource):
    """Nobody guesses."""

    def speculating(self, rows: np.ndarray) -> bool:
        return False

    def add_to(self, step: ScheduledStep, limits: StepLimits) -> ScheduledStep:
        return step
