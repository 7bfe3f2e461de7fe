"""The memory of K and V: one pair of tensors a layer, in blocks of 32 positions.

Owned by the worker's runner; attention backends read and write it, the core decides which
block belongs to whom.  Contents of a block beyond what its owner has written are stale and
may be anything, NaN included.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gpu_worker.models.spec import ModelSpec
from protocol.codec import BLOCK_SIZE_TOKENS


class KVCache:
    """K and V of every layer: [num_blocks, num_kv_heads, 32, head_dim] each."""

    def __init__(self, spec: ModelSpec, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.key: list[Tensor] = []
        self.value: list[Tensor] = []
        for layer in spec.layers:
            shape = (num_blocks, layer.num_kv_heads, BLOCK_SIZE_TOKENS, layer.head_dim)
            self.key.append(_zeros(shape, dtype, device))
            self.value.append(_zeros(shape, dtype, device))

    @staticmethod
    def block_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, K and V."""
        values = sum(layer.num_kv_heads * layer.head_dim for layer in spec.layers)
        return 2 * BLOCK_SIZE_TOKENS * values * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the pages come from the system when first touched (torch writes them all now)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = np.int16 if dtype.itemsize == 2 else np.int32
    return torch.from_numpy(np.zeros(shape, dtype=size)).view(dtype)
