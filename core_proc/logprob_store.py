"""Logprob rows of one request, kept until its frontend has seen its end.

Owned by ``Request``: a frontend that missed a message is given the rows again.
"""

from __future__ import annotations

import numpy as np


class LogprobStore:
    """Rows of ``width`` (id, value) pairs and the rank of the first.

    ``first`` rows were kept by an earlier core and are not here: tokens that a request
    arrived with.
    """

    def __init__(self, width: int, first: int = 0) -> None:
        self.width, self._first = width, first
        self._ids: list[np.ndarray] = []       # each i32[k, width]
        self._values: list[np.ndarray] = []    # each f32[k, width]
        self._ranks: list[np.ndarray] = []     # each i32[k]
        self._num_rows = 0

    def __len__(self) -> int:
        return self._first + self._num_rows

    def append(self, ids: np.ndarray, values: np.ndarray, ranks: np.ndarray) -> None:
        """Rows that may be wider than ours; copied, so that no frame is kept alive."""
        self._ids.append(ids[:, :self.width].copy())
        self._values.append(values[:, :self.width].copy())
        self._ranks.append(ranks.copy())
        self._num_rows += len(ranks)

    def rows(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, values, ranks) of rows start … end - 1; ``start`` not before ``first``."""
        start, end = start - self._first, end - self._first
        if len(self._ranks) > 1:
            self._ids, self._values, self._ranks = (
                [np.concatenate(parts)] for parts in (self._ids, self._values, self._ranks))
        if not self._ranks:
            return (np.empty((0, self.width), np.int32), np.empty((0, self.width), np.float32), np.empty(0, np.int32))
        return self._ids[0][start:end], self._values[0][start:end], self._ranks[0][start:end]


def widened(ids: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up to ``width`` with id -1."""
    missing = width - ids.shape[1]
    if not missing:
        return ids, values
    return (np.pad(ids, ((0, 0), (0, missing)), constant_values=-1), np.pad(values, ((0, 0), (0, missing))))
