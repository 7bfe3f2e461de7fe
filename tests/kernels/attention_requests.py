"""Requests of random Q, K and V, run through an attention backend step by step, and in float64.

Used by the attention tests: the same requests in any batch, cut into any chunks, on any blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpu_worker.attention.interface import AttentionBackend, AttentionLayer, AttentionMetadata
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.spec import ModelSpec

BLOCK = 32
Step = list[tuple[int, int]]          # (request, its next tokens)


@dataclass
class Requests:
    """``layer``'s attention for some requests; every step of ``attended`` computes some tokens of some of them."""

    layer: AttentionLayer
    dtype: torch.dtype
    kv_dtype: torch.dtype
    qkv: list[Tensor]                 # by request: [length, num_heads + 2 * num_kv_heads, head_dim]

    @classmethod
    def random(cls, lengths: list[int], dtype: torch.dtype = torch.float32, kv_dtype: torch.dtype | None = None, *, heads: int = 6,
               kv_heads: int = 2, dim: int = 64, window: int | None = None, softcap: float | None = None, spread: float = 1.0,
               seed: int = 0) -> Requests:
        generator = torch.Generator().manual_seed(seed)
        qkv = [(torch.randn(n, heads + 2 * kv_heads, dim, generator=generator) * spread).to(dtype) for n in lengths]
        return cls(AttentionLayer(0, heads, kv_heads, dim, dim**-0.5, window, softcap), dtype, kv_dtype or dtype, qkv)

    @property
    def lengths(self) -> list[int]:
        return [len(x) for x in self.qkv]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self.layer.num_heads, self.layer.num_kv_heads
        return x.split((heads, kv_heads, kv_heads), dim=1)

    def attended(self, backend: AttentionBackend, steps: list[Step], seed: int = 0, padding: int = 3) -> dict[int, Tensor]:
        """By request: [tokens computed, num_heads * head_dim], on blocks in an order by ``seed`` that held NaN before."""
        blocks = [-(-n // BLOCK) for n in self.lengths]
        order = np.random.default_rng(seed).permutation(sum(blocks) + 5).astype(np.int32)
        tables = np.split(order, np.cumsum(blocks))
        spec = ModelSpec("test", "decoder", (self.layer,), 0, 0, 0, self.dtype, (), True)
        kv = KVCache(spec, len(order), self.kv_dtype, torch.device("cpu"))
        kv.fill_with_nan()
        done = [0] * len(blocks)
        found: dict[int, list[Tensor]] = {}
        for step in steps:
            rows = [(request, done[request], count) for request, count in step]
            output = self._step(backend, kv, tables, rows, padding)
            for (request, _begin, count), part in zip(rows, output, strict=True):
                found.setdefault(request, []).append(part)
                done[request] += count
        return {request: torch.cat(parts) for request, parts in found.items()}

    def _step(self, backend: AttentionBackend, kv: KVCache, tables: list[np.ndarray], rows: list[tuple[int, int, int]],
              padding: int) -> list[Tensor]:
        counts = np.array([count for _request, _begin, count in rows], np.int32)
        seq_lens = np.array([begin + count for _request, begin, count in rows], np.int32)
        table = np.zeros((len(rows), max(-(-n // BLOCK) for n in seq_lens)), np.int32)
        slots, tokens = [], []
        for i, (request, begin, count) in enumerate(rows):
            own = tables[request][:table.shape[1]]
            table[i, :len(own)] = own
            positions = np.arange(begin, begin + count)
            slots.append(tables[request][positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK)
            tokens.append(self.qkv[request][begin:begin + count])
        total = int(counts.sum())
        metadata = AttentionMetadata(
            query_start_loc=torch.from_numpy(np.concatenate(([0], np.cumsum(counts))).astype(np.int32)), seq_lens=torch.from_numpy(seq_lens),
            block_table=torch.from_numpy(table), slot_mapping=torch.from_numpy(np.concatenate((*slots, [-1] * padding)).astype(np.int64)),
            query_lens_host=counts, seq_lens_host=seq_lens, num_tokens=total)
        batch = torch.cat((*tokens, torch.full((padding, *self.qkv[0].shape[1:]), float("nan"), dtype=self.dtype)))
        output = backend.begin(metadata, kv).attend(self.layer, *self.split(batch))
        assert output.shape == (total + padding, self.layer.num_heads * self.layer.head_dim) and output.dtype == self.dtype
        assert not output[total:].any()
        return list(output[:total].split(counts.tolist()))

    def stored(self, x: Tensor) -> Tensor:
        """K or V as the cache keeps it, float64."""
        if self.kv_dtype != torch.int8:
            return x.to(self.kv_dtype).double()
        largest = x.float().abs().amax(-1, keepdim=True)
        return (x.float() * (torch.full_like(largest, 127) / largest)).round().double() * (largest / 127).double()

    def exact(self, request: int) -> Tensor:
        """[length, num_heads * head_dim] in float64."""
        layer, (query, key, value) = self.layer, self.split(self.qkv[request])
        group = layer.num_heads // layer.num_kv_heads
        key, value = (self.stored(x).repeat_interleave(group, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query.double(), key) * layer.scale
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        position = torch.arange(len(query))
        hidden = position[None, :] > position[:, None]
        if layer.window is not None:
            hidden |= position[None, :] <= position[:, None] - layer.window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).reshape(len(query), -1)


def together(lengths: list[int]) -> list[Step]:
    return [list(enumerate(lengths))]


def in_chunks(request: int, length: int, chunks: tuple[int, ...]) -> list[Step]:
    """The request alone, in pieces whose sizes repeat."""
    steps, begin, turn = [], 0, 0
    while begin < length:
        count = min(chunks[turn % len(chunks)], length - begin)
        steps.append([(request, count)])
        begin, turn = begin + count, turn + 1
    return steps
