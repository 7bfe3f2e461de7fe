"""Where the last few tokens of a request have stood before in it.

Owned by ``NgramDrafts``.  For each running row and each length from ``shortest`` to
``longest`` a table of hash → the position after the newest n-gram that has it.  A new token
enters as many n-grams, for all rows at once; nothing is ever searched.  A collision loses an
older entry, and what is found is compared with the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from core_proc.request_rows import RequestRows

MOST_SLOTS_BITS = 14         # 64 KiB for each row and length; longer prompts forget their oldest n-grams
MULTIPLIER = np.uint32(0x9E3779B1)


class NgramIndex:
    """Knows the n-grams of ``rows`` up to, not with, their newest token."""

    def __init__(self, rows: RequestRows, longest: int, shortest: int) -> None:
        num_rows, self._row_len = rows.tokens.shape
        self._bits = min(MOST_SLOTS_BITS, max(8, (self._row_len - 1).bit_length()))
        self._rows, self._tokens = rows, rows.tokens.reshape(-1)
        self._longest, self._shortest = longest, shortest
        self._tables = np.zeros((longest - shortest + 1, num_rows, 1 << self._bits), np.int32)    # pages come when touched
        self._entered = np.zeros(num_rows, np.int32)       # n-grams that end before this position are in
        self._back = np.arange(longest)

    def reset(self, rows: np.ndarray) -> None:
        """Other requests are there now."""
        self._tables[:, rows] = 0
        self._entered[rows] = 0

    def catch_up(self, rows: np.ndarray) -> None:
        """Enter what has become known since."""
        newest = self._rows.num_tokens[rows] - 1
        count = np.maximum(newest - self._entered[rows], 0)
        if not count.any():
            return
        owner = np.repeat(rows, count)
        end = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count - self._entered[rows], count)
        self._entered[rows] = newest
        for level, length, slot in self._slots(self._grams(owner, end)):
            inside = slice(None) if end.min() >= length - 1 else end >= length - 1
            self._tables[level, owner[inside], slot[inside]] = end[inside] + 1     # of equal ones the newest stays

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position after the longest known tail of each row that has stood before, 0: none; its length)."""
        end = self._rows.num_tokens[rows] - 1
        tail = self._grams(rows, end)
        found, found_length = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
        for level, length, slot in self._slots(tail):
            source = self._tables[level, rows, slot]
            there = self._grams(rows, source - 1)[:, :length]
            good = (source >= length) & (there == tail[:, :length]).all(axis=1)
            found, found_length = np.where(good, source, found), np.where(good, length, found_length)
        return found, found_length

    def following(self, rows: np.ndarray, source: np.ndarray, count: np.ndarray) -> np.ndarray:
        """``count[i]`` tokens from position ``source[i]`` on, flat; what ends too soon is repeated from there."""
        owner, start = np.repeat(rows, count), np.repeat(source, count)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        period = np.repeat(self._rows.num_tokens[rows] - source, count)
        return self._tokens[owner * self._row_len + start + number % period]

    def _grams(self, owner: np.ndarray, end: np.ndarray) -> np.ndarray:
        """i32 [n, longest] tokens from position ``end`` back; before a row's beginning anything."""
        return self._tokens[np.maximum(owner.astype(np.int64) * self._row_len + end, 0)[:, None] - self._back]

    def _slots(self, grams: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(table, length, slot of each) from the shortest length on."""
        hashed = np.zeros(len(grams), np.uint32)
        shift = np.uint32(32 - self._bits)
        for i in range(self._longest):
            hashed = (hashed + grams[:, i].astype(np.uint32)) * MULTIPLIER
            if i + 1 >= self._shortest:
                yield i + 1 - self._shortest, i + 1, hashed >> shift
