"""Which KV blocks are held, free or cached: reference counts, the free list, the hash index.

Owned by ``KVCacheManager``; no one else touches it.  What must stay true
(``check_integrity``): a block is in the free list if and only if nobody holds it; the
index names exactly the blocks that carry a hash, each under its own.  A free block keeps
its hash, so a later request may still hit it, until ``allocate`` takes it for something
else (eviction): least recently freed first, blocks without a hash before all others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Blocks 0 … num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_evicted = 0                     # blocks whose hash made room, ever
        self._ref_count = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # front goes first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def lookup(self, block_hash: bytes) -> int | None:
        """The published block with this hash."""
        return self._block_of.get(block_hash)

    def count_free(self, block_ids: Iterable[int]) -> int:
        """How many of these nobody holds."""
        return sum(self._ref_count[block_id] == 0 for block_id in block_ids)

    def allocate(self, count: int) -> list[int]:
        """``count`` free blocks with one reference each; the caller has looked at ``num_free``."""
        taken = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            block_hash = self._hash_of[block_id]
            if block_hash is not None:
                del self._block_of[block_hash]
                self._hash_of[block_id] = None
                self.num_evicted += 1
            self._ref_count[block_id] = 1
            taken.append(block_id)
        return taken

    def take(self, block_ids: Iterable[int]) -> None:
        """One more reference on published blocks."""
        for block_id in block_ids:
            if self._ref_count[block_id] == 0:
                del self._free[block_id]
            self._ref_count[block_id] += 1

    def release(self, block_ids: list[int]) -> None:
        """One reference less; the tail of a sequence is evicted before its head."""
        for block_id in reversed(block_ids):
            self._ref_count[block_id] = held = self._ref_count[block_id] - 1
            if held == 0:
                self._free[block_id] = None
                if self._hash_of[block_id] is None:
                    self._free.move_to_end(block_id, last=False)
            elif held < 0:
                raise AssertionError(f"block {block_id} released more often than taken")

    def publish(self, block_id: int, block_hash: bytes) -> bool:
        """Let others hit this block; False if another block already has the hash (the first copy stays)."""
        if block_hash in self._block_of or self._hash_of[block_id] is not None:
            return False
        self._block_of[block_hash] = block_id
        self._hash_of[block_id] = block_hash
        return True

    def check_integrity(self, holders: list[int]) -> None:
        """``holders[b]``: how many requests have block b in their table.  AssertionError otherwise."""
        assert holders == self._ref_count, "reference counts differ from the block tables"
        free = {block_id for block_id, count in enumerate(holders) if count == 0}
        assert set(self._free) == free, "the free list is not the set of blocks nobody holds"
        named = {block_id: block_hash for block_hash, block_id in self._block_of.items()}
        hashed = {block_id: h for block_id, h in enumerate(self._hash_of) if h is not None}
        assert named == hashed, "index and block hashes differ"
