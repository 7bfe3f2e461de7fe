"""Memory in pages of 2 MiB, for what is read anew for every token: weights, K and V.

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
CHUNK_BYTES = 1 << 26


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
        return cls(sum(whole_lines(tensor.nbytes) for tensor in tensors))

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` that lies here."""
        return self.room(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def room(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], zeros, for the caller to fill."""
        start, self._next = self._next, self._next + whole_lines(num_bytes)
        assert self._next <= self._end, "no room was asked for this tensor"
        return self._bytes[start:start + num_bytes]

    def fits(self, num_bytes: int) -> bool:
        """Whether there is room for so many bytes."""
        return self._next + num_bytes <= self._end


class GrowingHugePages:
    """Room for copies of tensors that nobody has counted: more of it whenever the last is used up."""

    def __init__(self) -> None:
        self._pages = HugePages(0)

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` that lies here."""
        if not self._pages.fits(tensor.nbytes):
            self._pages = HugePages(max(CHUNK_BYTES, whole_lines(tensor.nbytes)))     # untouched pages are no memory
        return self._pages.take(tensor)


def whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES
