"""Memory in pages of 2 MiB, for weights that are read from end to end for every token.

With pages of 4 KiB, as a mapped file has them, the same reads took a quarter longer: the
processor fetches ahead no further than to the end of a page, and looks up each one.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

PAGE_BYTES = 1 << 21
LINE_BYTES = 64


class HugePages:
    """Room for copies of tensors, each on a cache line of its own; small pages where the system has no others."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = mmap.mmap(-1, num_bytes + PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._next = -self._bytes.data_ptr() % PAGE_BYTES
        self._end = self._next + num_bytes

    @classmethod
    def for_tensors(cls, tensors: Iterable[Tensor]) -> HugePages:
        return cls(sum(_whole_lines(tensor.nbytes) for tensor in tensors))

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` that lies here."""
        start, self._next = self._next, self._next + _whole_lines(tensor.nbytes)
        assert self._next <= self._end, "no room was asked for this tensor"
        return self._bytes[start:start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES
