"""Requests in a paged K/V cache, attended to step by step through any attention backend.

Used by the tests of attention.  The cache starts as not-a-number throughout, block ids are
shuffled, and padding tokens are not-a-number too: whoever reads what he should not, shows it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gpu_worker.attention.interface import AttentionBackend, AttentionLayer, AttentionMetadata
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.spec import ModelSpec
from gpu_worker.row_buckets import bucket
from protocol.codec import BLOCK_SIZE_TOKENS

CPU = torch.device("cpu")
Row = tuple[int, int, int]      # request, tokens computed before, tokens of this step


def random_request(layer: AttentionLayer, num_tokens: int, dtype: torch.dtype, seed: int, *, heavy_tailed: bool = False) -> Tensor:
    """[num_tokens, num_heads + 2 * num_kv_heads, head_dim]: queries, keys, values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, layer.num_heads + 2 * layer.num_kv_heads, layer.head_dim)
    values = torch.randn(shape, generator=generator)
    if heavy_tailed:
        values *= 2.0 ** torch.randint(-8, 9, shape, generator=generator)
    return values.to(dtype)


def parts(layer: AttentionLayer, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.split((layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), dim=1)


class PagedRequests:
    """Some requests of one layer, and a cache that holds them."""

    def __init__(self, attention: AttentionBackend, layer: AttentionLayer, requests: list[Tensor], *, seed: int = 0) -> None:
        dtype = requests[0].dtype
        self._attention, self._layer, self._requests = attention, layer, requests
        blocks_each = [-(-len(tokens) // BLOCK_SIZE_TOKENS) for tokens in requests]
        self.kv = KVCache(ModelSpec("test", "decoder", (layer,), 1, 1, 1, dtype, (), True), sum(blocks_each), dtype, CPU)
        self.kv.fill_with_nan()
        ids = np.random.default_rng(seed).permutation(sum(blocks_each)).astype(np.int32)
        self.blocks = np.split(ids, np.cumsum(blocks_each)[:-1])

    def step(self, rows: list[Row]) -> list[Tensor]:
        """[new, num_heads * head_dim] for each row."""
        lens = np.array([new for _request, _computed, new in rows], dtype=np.int32)
        seq_lens = np.array([computed + new for _request, computed, new in rows], dtype=np.int32)
        num_tokens = int(lens.sum())
        num_blocks = -(-int(seq_lens.max()) // BLOCK_SIZE_TOKENS)
        table = np.zeros((len(rows), num_blocks), dtype=np.int32)
        slots = np.full(bucket(num_tokens), -1, dtype=np.int64)
        tokens = torch.full((len(slots), *self._requests[0].shape[1:]), float("nan"), dtype=self._requests[0].dtype)
        ends = np.cumsum(lens)
        for row, (request, computed, new) in enumerate(rows):
            blocks = self.blocks[request][:num_blocks]
            table[row, :len(blocks)] = blocks
            positions = np.arange(computed, computed + new)
            slots[ends[row] - new:ends[row]] = blocks[positions // BLOCK_SIZE_TOKENS] * BLOCK_SIZE_TOKENS + positions % BLOCK_SIZE_TOKENS
            tokens[int(ends[row]) - new:int(ends[row])] = self._requests[request][computed:computed + new]
        metadata = AttentionMetadata(
            query_start_loc=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)), seq_lens=torch.from_numpy(seq_lens),
            block_table=torch.from_numpy(table), slot_mapping=torch.from_numpy(slots), query_lens_host=lens, seq_lens_host=seq_lens,
            num_tokens=num_tokens)
        output = self._attention.begin(metadata, self.kv).attend(self._layer, *parts(self._layer, tokens))
        assert not output[num_tokens:].any()          # padding comes back as zeros
        return list(output[:num_tokens].split(lens.tolist()))

    def in_chunks(self, request: int, chunks: list[int]) -> Tensor:
        """The request alone, piece by piece from its beginning on."""
        ends = np.cumsum(chunks).tolist()
        return torch.cat([self.step([(request, end - new, new)])[0] for end, new in zip(ends, chunks, strict=True)])
