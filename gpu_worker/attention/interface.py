"""What the models ask of attention, whichever backend answers.

The runner builds one ``AttentionMetadata`` a step; a model calls ``backend.begin`` once a
forward and then ``attend`` once a layer.  Every backend must keep two rules: the K/V of the
whole batch are stored before any row attends, and K/V are read only as stored in the cache,
so that a row's result depends on nothing but its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from gpu_worker.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What one layer's attention computes; the same in every step."""

    index: int                    # which K/V of the cache
    num_heads: int                # query heads
    num_kv_heads: int
    head_dim: int
    scale: float                  # scores are multiplied by it
    window: int | None = None     # tokens a query sees, itself included; None: all before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step's batch: real rows only, rows in the order of their tokens."""

    query_start_loc: Tensor       # int32 [num_rows + 1], on the device
    seq_lens: Tensor              # int32 [num_rows] keys that the row's last token sees, this step's included
    block_table: Tensor           # int32 [num_rows, max_blocks_in_batch]
    slot_mapping: Tensor          # int64 [num_padded_tokens] block_id * 32 + offset, -1 for padding
    query_lens_host: np.ndarray   # int32 [num_rows]
    seq_lens_host: np.ndarray     # int32 [num_rows]
    num_tokens: int               # real tokens: the first rows of the forward's tensors


class StepAttention(Protocol):
    """Attention of one step, for all layers."""

    def attend(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores key and value of all real tokens, then attends.

        query [num_padded_tokens, num_heads, head_dim], key and value
        [num_padded_tokens, num_kv_heads, head_dim] → [num_padded_tokens, num_heads * head_dim];
        padding rows come back as zeros.
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute attention on one device."""

    name: str

    def begin(self, metadata: AttentionMetadata, kv: KVCache) -> StepAttention:
        """The attention of one step; cheap, called once a forward."""
        ...
