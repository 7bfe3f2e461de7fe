"""Progress pages: one small mapped file per process, written by it, read by launch.py
and ``folovllm status``.

A reader needs nobody's answer, so a hanging process can be looked at.  Numbers are
single aligned 8-byte words, which x86-64 stores whole; texts are written once, before
the state that tells of them.
"""

from __future__ import annotations

import enum
import mmap
import os
from pathlib import Path

import numpy as np

PAGE_BYTES = 8192
_TEXTS_START = 1024
_TEXT_BYTES = 1024


class State(enum.IntEnum):
    """Where a process stands."""

    STARTING = 0
    LOADING = 1
    READY = 2
    DRAINING = 3
    FAILED = 4


COUNTERS = (
    "pid", "rank", "epoch", "gen", "state", "ticks", "steps_started", "steps_done", "tokens",
    "running", "waiting", "blocks", "used_blocks", "max_model_len", "num_threads", "vocab_size",
    "preemptions", "cached_tokens", "computed_tokens", "streams", "step_us", "draft_tokens", "accepted_tokens",
)
TEXTS = ("role", "device", "dtype", "fingerprint", "error", "note")


class ProgressPage:
    """``page.set("running", 3)``, ``page.add("ticks")``, ``page.get("state")``, texts likewise."""

    def __init__(self, path: Path, writable: bool = False) -> None:
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            if writable:
                _reserve(fd, path)
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(fd, PAGE_BYTES, access=access)
        finally:
            os.close(fd)
        self._words = np.frombuffer(self._map, dtype="<i8", count=len(COUNTERS))
        self._index = {name: i for i, name in enumerate(COUNTERS)}

    @classmethod
    def create(cls, path: Path, role: str, rank: int = 0, epoch: int = 0, gen: int = 0) -> "ProgressPage":
        """A fresh page for this process."""
        path.unlink(missing_ok=True)
        page = cls(path, writable=True)
        page.set_text("role", role)
        for name, value in (("rank", rank), ("epoch", epoch), ("gen", gen), ("pid", os.getpid())):
            page.set(name, value)
        return page

    def set(self, name: str, value: int) -> None:
        self._words[self._index[name]] = value

    def add(self, name: str, amount: int = 1) -> None:
        self._words[self._index[name]] += amount

    def get(self, name: str) -> int:
        return int(self._words[self._index[name]])

    def set_text(self, name: str, text: str) -> None:
        """At most 1,023 bytes; a longer text is cut at the end with an ellipsis."""
        data = text.encode()
        if len(data) >= _TEXT_BYTES:
            data = data[:_TEXT_BYTES - 4].decode(errors="ignore").encode() + "…".encode()
        start = self._text_start(name)
        self._map[start:start + _TEXT_BYTES] = data.ljust(_TEXT_BYTES, b"\0")

    def get_text(self, name: str) -> str:
        start = self._text_start(name)
        return self._map[start:start + _TEXT_BYTES].split(b"\0", 1)[0].decode(errors="replace")

    def close(self) -> None:
        del self._words
        self._map.close()

    @staticmethod
    def _text_start(name: str) -> int:
        return _TEXTS_START + TEXTS.index(name) * _TEXT_BYTES


def _reserve(fd: int, path: Path) -> None:
    """Room on the disk for the whole page: a write to a mapping without would be SIGBUS."""
    try:
        os.posix_fallocate(fd, 0, PAGE_BYTES)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
