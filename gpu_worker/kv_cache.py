"""The memory of K and V: one pair of tensors a layer, in blocks of 32 positions.

Owned by the worker's runner; the core decides which block belongs to whom.  One attention
backend reads and writes it, in an order of its own within a block and KV head.  int8 K and V
have a float32 scale for each token and KV head beside them.  Contents of a block beyond what
its owner has written are stale and may be anything, NaN included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.kernels.huge_pages import LINE_BYTES, HugePages
from gpu_worker.models.spec import ModelSpec
from protocol.codec import BLOCK_SIZE_TOKENS

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class LayerKV:
    """K and V of one layer."""

    key: Tensor                   # [num_blocks, num_kv_heads, 32, head_dim]
    value: Tensor
    key_scale: Tensor | None      # float32 [num_blocks, num_kv_heads, 32], for int8: key = key · key_scale
    value_scale: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.key, self.value, self.key_scale, self.value_scale) if tensor is not None]


class KVCache:
    """K and V of every layer."""

    def __init__(self, spec: ModelSpec, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_blocks, self.dtype = num_blocks, dtype
        self.layers: list[LayerKV] = []
        zeros = _Zeros(spec, num_blocks, dtype, device)
        for layer in spec.layers:
            shape = (num_blocks, layer.num_kv_heads, BLOCK_SIZE_TOKENS, layer.head_dim)
            key, value = zeros.take(shape, dtype), zeros.take(shape, dtype)
            scales = [zeros.take(shape[:3], torch.float32) for _ in range(2)] if dtype == torch.int8 else [None, None]
            self.layers.append(LayerKV(key, value, *scales))

    def fill_with_nan(self) -> None:
        """As if every block had been used by something that went wrong: for checks of what is read."""
        for layer in self.layers:
            for tensor in layer.tensors():
                tensor.fill_(float("nan") if tensor.is_floating_point() else -127)

    @staticmethod
    def block_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, K and V."""
        scale_bytes = SCALE_BYTES if dtype == torch.int8 else 0
        return 2 * BLOCK_SIZE_TOKENS * sum(layer.num_kv_heads * (layer.head_dim * dtype.itemsize + scale_bytes) for layer in spec.layers)


class _Zeros:
    """Where the tensors come from.  On a CPU the system gives a page when it is first touched, and a large one: with small
    ones a decode looks up as many as it reads tiles."""

    def __init__(self, spec: ModelSpec, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        if device.type == "cpu":
            starts = 4 * LINE_BYTES * len(spec.layers)          # each of a layer's tensors begins on a line
            self._pages = HugePages(num_blocks * KVCache.block_bytes(spec, dtype) + starts)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self._device)
        return self._pages.room(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
