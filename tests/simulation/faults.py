"""What goes wrong in the worker, and what is remembered of it: who may have ended badly."""

from __future__ import annotations

import enum
import random
from collections import Counter
from dataclasses import dataclass

from protocol.steps import StepStatus
from simulation.reference import Wish
from simulation.world import World


class Stage(enum.Enum):
    """How far a failing step comes."""

    ADMITTED = enum.auto()       # nothing is stored
    STORING = enum.auto()        # some positions are stored, some spoilt
    SAMPLED = enum.auto()        # everything is done but the result is lost


@dataclass(frozen=True)
class RowToRun:
    """One row of a step, as far as faults care."""

    seed: int
    num_tokens: int              # of this step
    num_output: int              # output tokens that its last computed token stands at; negative within the prompt


class Faults:
    """Asked once for each step and each row; ``poison`` tells from which output token on a seed is deadly."""

    def __init__(self, rng: random.Random, world: World) -> None:
        self.rng, self.world = rng, world
        self.poison: dict[int, int] = {}
        self.alone: Counter[int] = Counter()         # seed → internal failures alone in a step
        self.no_memory: set[int] = set()             # seeds that failed for memory alone with one token
        self.bad_rows: set[int] = set()              # seeds with a row error

    def arrives(self, wish: Wish) -> None:
        if self.world.poison and self.rng.random() < 0.1:
            self.poison[wish.seed] = self.rng.randint(-3, 6)

    def of_step(self, rows: list[RowToRun]) -> StepStatus:
        """OK, or how it fails."""
        status = self._status(rows)
        if status is StepStatus.FAILED_INTERNAL and len(rows) == 1:
            self.alone[rows[0].seed] += 1
        if status is StepStatus.FAILED_MEMORY and len(rows) == 1 and rows[0].num_tokens == 1:
            self.no_memory.add(rows[0].seed)
        return status

    def _status(self, rows: list[RowToRun]) -> StepStatus:
        world = self.world
        if world.poison in ("internal", "memory") and any(self._is_deadly(row) for row in rows):
            return StepStatus.FAILED_INTERNAL if world.poison == "internal" else StepStatus.FAILED_MEMORY
        if len(rows) > world.row_cap or sum(row.num_tokens for row in rows) > world.token_cap:
            return StepStatus.FAILED_MEMORY
        if self.rng.random() < world.fail:
            return self.rng.choice([StepStatus.FAILED_MEMORY, StepStatus.FAILED_INTERNAL])
        return StepStatus.OK

    def stage(self) -> Stage:
        return self.rng.choice(list(Stage))

    def of_row(self, row: RowToRun) -> bool:
        """Whether the row fails alone."""
        fails = self.rng.random() < self.world.row_error or (self.world.poison == "row" and self._is_deadly(row))
        if fails:
            self.bad_rows.add(row.seed)
        return fails

    def _is_deadly(self, row: RowToRun) -> bool:
        return row.num_output >= self.poison.get(row.seed, 10**6)
