"""Logprob rows on their way from the core to a client: appended as they come, taken as
deltas leave.

Owned by one child stream of the ledger (``session``).  All rows of a buffer have the same
width: column 0 the token itself, then the best ``width - 1`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from protocol.steps import LogprobRows


class LogprobBuffer:
    """Rows not yet delivered, first in first out."""

    def __init__(self, width: int) -> None:
        self.width = width               # columns: 1 + the number of best tokens asked for
        self._ids = bytearray()          # i32[n, width]
        self._values = bytearray()       # f32[n, width]
        self._ranks = bytearray()        # i32[n]

    def __len__(self) -> int:
        return len(self._ranks) // 4

    def append(self, ids: np.ndarray, values: np.ndarray, ranks: np.ndarray) -> None:
        """``ids``, ``values``: [n, at least width] (the core's columns are those of its widest
        stream); ``ranks``: [n]."""
        self._ids += ids[:, :self.width].tobytes()
        self._values += values[:, :self.width].tobytes()
        self._ranks += ranks.tobytes()

    def peek(self, count: int) -> LogprobRows:
        """The first ``count`` rows."""
        size = 4 * self.width * count
        return LogprobRows(self.width, bytes(self._ids[:size]), bytes(self._values[:size]),
                           bytes(self._ranks[:4 * count]))

    def drop(self, count: int) -> None:
        """Forget the first ``count`` rows: they have been delivered."""
        del self._ids[:4 * self.width * count]
        del self._values[:4 * self.width * count]
        del self._ranks[:4 * count]


def token_texts(rows: LogprobRows, text_of: Callable[[int], str]) -> list[str]:
    """The text of each entry of ``rows.ids``, row by row; "" for the filler -1."""
    return [text_of(token) if token >= 0 else "" for token in np.frombuffer(rows.ids, "<i4").tolist()]
