"""What a loaded model is to the rest of the worker, whichever backend runs it.

``ModelSpec`` are its shapes and limits; ``LoadedModel`` its abilities: forward, logits, a
fingerprint of its weights, and its products one by one, for the self-check.  Made by
``registry.load_model``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gpu_worker.attention.interface import AttentionBackend, AttentionLayer, AttentionMetadata
from gpu_worker.picking import Picker

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
    dtype: torch.dtype                    # of the activations between operators, of weights and K/V where nothing else is said
    eos_token_ids: tuple[int, ...]        # ascending; config and generation_config together
    supports_bit_exact: bool              # False: a row's bits may depend on the batch; not even checked
    quantization: str | None = None       # of the weights: "int8" or "int4"
    other_kv_dtype: torch.dtype | None = None   # of the KV cache, where it is not ``dtype``

    @property
    def kv_dtype(self) -> torch.dtype:
        """What K and V are stored as."""
        return self.other_kv_dtype or self.dtype

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


class RowProduct(Protocol):
    """A weight matrix, and a bias, that rows are multiplied with."""

    in_features: int
    out_features: int
    input_dtype: torch.dtype
    kind: str                             # what chooses its arithmetic beside shape and ``input_dtype``, in words
    integers: tuple[int, int] | None      # the least and the largest weight, where weights are integers with scales

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in_features] in ``input_dtype`` → [rows, out_features]."""
        ...

    def of_integers(self, values: Tensor) -> RowProduct:
        """The same with other weights, int64 [outputs, inputs] within ``integers``, all scales 1 and no bias."""
        ...


def kind_of(arithmetic: str, bias: Tensor | None) -> str:
    """For ``RowProduct.kind``."""
    return arithmetic if bias is None else f"{arithmetic}, bias"


class LoadedModel(Protocol):
    """A model with its weights, ready to run."""

    spec: ModelSpec
    attention: AttentionBackend
    picker: Picker                        # of tokens from its logits
    weights_fingerprint: str
    pads_rows: bool                       # its products want buckets of rows (``row_buckets.py``)
    slower_because: str | None            # why own kernels do not run all of it, where they should

    def forward(self, token_ids: Tensor, positions: Tensor, attn: AttentionMetadata, kv: KVCache) -> Tensor:
        """int64 [num_padded_tokens] twice → hidden states [num_padded_tokens, hidden_size]."""
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size], n padded to a bucket by the caller → float32 [n, vocab_size]."""
        ...

    def linears(self) -> list[RowProduct]:
        """Every product that a forward runs, but for attention's."""
        ...

    def head(self) -> RowProduct:
        """The product behind ``compute_logits``."""
        ...
