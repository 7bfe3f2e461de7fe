"""What a loaded model is to the rest of the worker, whichever backend runs it.

``ModelSpec`` are its shapes and limits; ``LoadedModel`` its three abilities: forward,
logits, and a fingerprint of its weights.  Made by ``registry.load_model``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gpu_worker.attention.interface import AttentionBackend, AttentionLayer, AttentionMetadata

if TYPE_CHECKING:
    from gpu_worker.kv_cache import KVCache


class ModelError(ValueError):
    """A model that cannot be loaded; the message names the file, tensor or field."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes and limits of a model."""

    name: str                             # architecture, e.g. "llama"
    backend: str                          # "decoder" or "transformers"
    layers: tuple[AttentionLayer, ...]
    hidden_size: int
    vocab_size: int
    max_model_len: int                    # tokens, as the model's config allows
    dtype: torch.dtype                    # of weights and KV cache
    eos_token_ids: tuple[int, ...]        # ascending; config and generation_config together
    supports_bit_exact: bool              # False: a row's bits are known to depend on the batch

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        return max(layer.num_heads for layer in self.layers)

    @property
    def num_kv_heads(self) -> int:
        return max(layer.num_kv_heads for layer in self.layers)

    @property
    def head_dim(self) -> int:
        return max(layer.head_dim for layer in self.layers)


class LoadedModel(Protocol):
    """A model with its weights, ready to run."""

    spec: ModelSpec
    attention: AttentionBackend
    weights_fingerprint: str

    def forward(self, token_ids: Tensor, positions: Tensor, attn: AttentionMetadata, kv: KVCache) -> Tensor:
        """int64 [num_padded_tokens] twice → hidden states [num_padded_tokens, hidden_size]."""
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size], n padded to a bucket by the caller → float32 [n, vocab_size]."""
        ...
