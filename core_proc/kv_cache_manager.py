"""KV blocks of requests: prefix hits, growth, publication.

Owned by ``LiveRequests``, asked by the scheduler.  What must stay true: a block is
published only when its K/V has been confirmed by a result, and a request waits for a block
only while a living request is writing it.
"""

from __future__ import annotations

import numpy as np

from core_proc.block_pool import BlockPool
from core_proc.request import Request, RequestStatus
from core_proc.request_rows import RequestRows


class KVCacheManager:
    """One pool of blocks, used by the requests in ``rows``."""

    def __init__(self, pool: BlockPool, rows: RequestRows, block_size: int) -> None:
        self.pool, self.rows, self.block_size = pool, rows, block_size
        self._writers: dict[bytes, tuple[Request, int, int]] = {}    # hash → writer, its admission, end of the block

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, request: Request) -> list[int]:
        """Published blocks that a waiting request begins with; never all of its tokens."""
        hits: list[int] = []
        for index in range(self._num_matchable(request)):
            block_id = self.pool.lookup(request.block_hash(index, request.token_ids, self.block_size))
            if block_id is None:
                break
            hits.append(block_id)
        return hits

    def is_being_written(self, request: Request, index: int) -> bool:
        """Whether a living request is computing block ``index``, the first that ``request`` misses."""
        if index >= self._num_matchable(request):
            return False
        writer = self._writers.get(request.block_hash(index, request.token_ids, self.block_size))
        return writer is not None and self._is_alive(*writer)

    def note_writer(self, request: Request, start: int, end: int) -> None:
        """The step in the making computes tokens start … end - 1 of a running request."""
        tokens = self.rows.tokens[request.req_idx]
        for index in range(start // self.block_size, end // self.block_size):
            block_hash = request.block_hash(index, tokens, self.block_size)
            writer = self._writers.get(block_hash)
            if writer is None or not self._is_alive(*writer):
                self._writers[block_hash] = (request, request.serial, (index + 1) * self.block_size)

    def take(self, hits: list[int], num_blocks: int) -> list[int]:
        """The block list of a request that starts with ``hits`` and needs ``num_blocks`` in all."""
        self.pool.take(hits)
        return hits + self.pool.allocate(max(0, num_blocks - len(hits)))

    def missing(self, rows: np.ndarray, num_tokens: np.ndarray | int) -> np.ndarray:
        """Blocks that each of ``rows`` lacks to compute ``num_tokens`` more: i32[n]."""
        columns, size = self.rows, self.block_size
        after = columns.num_computed[rows] + num_tokens
        return np.maximum((after + (size - 1)) // size - columns.num_blocks[rows], 0)

    def grow(self, rows: np.ndarray, need: np.ndarray) -> np.ndarray:
        """``need[i]`` more blocks for ``rows[i]``: i32[k, 2] (req_idx, block_id)."""
        at = need.nonzero()[0]
        growing = rows[at].repeat(need[at])
        pairs = np.empty((len(growing), 2), np.int32)
        if len(growing):
            pairs[:, 0], pairs[:, 1] = growing, self.pool.allocate(len(growing))
            self.rows.append_blocks(pairs)
        return pairs

    def publish(self, request: Request) -> None:
        """Offer the blocks whose K/V is confirmed and whose tokens are known."""
        row, rows = request.req_idx, self.rows
        ready, published = min(int(rows.num_applied[row]), int(rows.num_tokens[row])) // self.block_size, int(rows.published[row])
        if ready <= published:
            return
        tokens, block_ids = rows.tokens[row], rows.block_table[row, published:ready].tolist()
        for index, block_id in enumerate(block_ids, published):
            block_hash = request.block_hash(index, tokens, self.block_size)
            self.pool.publish(block_id, block_hash)
            self._writers.pop(block_hash, None)
        rows.published[row] = ready

    def release(self, request: Request, block_ids: list[int], num_published: int) -> None:
        """A request has left its row: its blocks go back, and nobody waits for it any more."""
        self.pool.release(block_ids)
        for block_hash in request.hashes_from(num_published):
            writer = self._writers.get(block_hash)
            if writer is not None and writer[0] is request:
                del self._writers[block_hash]

    def _num_matchable(self, request: Request) -> int:
        return (request.num_tokens - 1) // self.block_size if request.reads_prefix_hits else 0

    def _is_alive(self, request: Request, serial: int, end: int) -> bool:
        row = request.req_idx
        return (request.status is RequestStatus.RUNNING and request.serial == serial
                and self.rows.num_applied[row] < end <= self.rows.num_computed[row])
