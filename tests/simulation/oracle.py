"""A source of drafts that knows the truth, and lies: right guesses, wrong ones, right ones after wrong ones.

It stands in for the index of n-grams alone; what is guessed when, how far, and what is
reserved for it is the product's own.
"""

from __future__ import annotations

import random

import numpy as np

from core_proc.engine_core import EngineCore
from simulation.reference import VOCAB, extend, next_token, prefixes


class OracleIndex:
    """In the place of ``NgramIndex``."""

    def __init__(self, core: EngineCore, longest: int, rng: random.Random) -> None:
        self.rows, self.longest, self.rng = core.rows, longest, rng

    def reset(self, rows: np.ndarray) -> None:
        pass

    def catch_up(self, rows: np.ndarray) -> None:
        pass

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As if the tail of most rows had stood at the beginning."""
        lengths = [self.rng.choice([0, 1, self.longest, self.longest]) for _ in rows]
        return np.ones(len(rows), np.int32), np.array(lengths, np.int32)

    def following(self, rows: np.ndarray, source: np.ndarray, count: np.ndarray) -> np.ndarray:
        return np.array([token for row, n in zip(rows.tolist(), count.tolist(), strict=True) for token in self._guess(row, n)], np.int32)

    def _guess(self, row: int, count: int) -> list[int]:
        request = self.rows.request[row]
        known = int(self.rows.num_tokens[row])
        prefix, guess = prefixes(self.rows.tokens[row, :known].tolist())[-1], []
        for number in range(known - request.prompt_len, known - request.prompt_len + count):
            token = next_token(prefix, request.seed, number)
            if self.rng.random() < 0.2:
                token = (token + 1) % VOCAB
            guess.append(token)
            prefix = extend(prefix, token)
        return guess


def install(core: EngineCore, rng: random.Random) -> None:
    """Where the core speculates at all."""
    if core.config.speculative != "none":
        core.scheduler.drafts._index = OracleIndex(core, core.config.prompt_lookup_max, rng)
