"""Paged attention on a CPU by the compiled kernels (``kernels/attention.h``).

Chosen by ``models/registry.py`` where the kernels could be built; it keeps the contract of
``reference.py`` (a token's bits depend on its own tokens alone), with an arithmetic of its own.
K and V lie in the cache's memory in the kernels' order (``kernels/kv.h``), which nobody else reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor

from gpu_worker.attention.interface import AttentionLayer, AttentionMetadata
from gpu_worker.kernels.attention import ACTIVATIONS, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, AttendCall, Batch, Heads, KVLayer, Plan, Shape
from gpu_worker.kernels.library import Library
from gpu_worker.kv_cache import KVCache


class CpuAttention:
    """The backend; memory of plans that no step uses is kept for the next."""

    def __init__(self, library: Library, num_threads: int) -> None:
        self.name = f"cpu kernels {library.build}"
        self._library, self._threads = library, num_threads
        self._free: list[Plan] = []

    @staticmethod
    def lacks_heads(head_dim: int, dtype: torch.dtype) -> str | None:
        """What such heads ask for and the kernels lack; None where they can be used."""
        if dtype not in ACTIVATIONS:
            return f"{dtype} is not among their types"
        if head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
            return f"heads of {head_dim} are not multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
        return None

    def begin(self, metadata: AttentionMetadata, kv: KVCache) -> _CpuStep:
        return _CpuStep(metadata, kv, self)

    def plan(self, shape: Shape, batch: Batch) -> Plan:
        """A plan for layers of one shape; given back by ``keep``."""
        plan = self._free.pop() if self._free else Plan(self._library)
        plan.make(batch, shape, self._threads)
        return plan

    def keep(self, plans: Iterable[Plan]) -> None:
        self._free.extend(plans)

    def run(self, call: AttendCall) -> None:
        call.threads = self._threads
        self._library.functions.folo_attend(ctypes.byref(call))


class _CpuStep:
    """One step; layers of equal shape and window share a plan."""

    def __init__(self, metadata: AttentionMetadata, kv: KVCache, backend: CpuAttention) -> None:
        self._metadata, self._kv, self._backend = metadata, kv, backend
        self._batch = batch_of(metadata)
        self._plans: dict[tuple[int, ...], Plan] = {}

    def __del__(self) -> None:
        self._backend.keep(self._plans.values())

    def attend(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (_readable(x, query.dtype) for x in (query, key, value))
        attended = query.new_empty(query.shape[0], layer.num_heads * layer.head_dim)
        kv = KVLayer.of(self._kv.layers[layer.index])
        self._backend.run(AttendCall(
            self._plan(layer).address, kv, Heads.of(query), Heads.of(key), Heads.of(value), self._metadata.slot_mapping.data_ptr(),
            attended.data_ptr(), layer.scale, layer.softcap or 0.0, self._metadata.num_tokens, query.shape[0],
            query.dtype == torch.bfloat16))
        return attended

    def _plan(self, layer: AttentionLayer) -> Plan:
        shape = (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.window or 0)
        if shape not in self._plans:
            self._plans[shape] = self._backend.plan(Shape(*shape), self._batch)
        return self._plans[shape]


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernels take it: of one type with the queries, a head's values one after another."""
    x = x.to(dtype)
    return x if x.stride(2) == 1 else x.contiguous()


def batch_of(metadata: AttentionMetadata) -> Batch:
    """The step's rows as the kernels see them; ``metadata`` must outlive it."""
    return Batch(len(metadata.query_lens_host), metadata.query_start_loc.data_ptr(), metadata.seq_lens.data_ptr(),
                 metadata.block_table.data_ptr(), metadata.block_table.stride(0))
