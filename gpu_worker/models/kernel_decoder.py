"""The lean decoder on a CPU by the compiled kernels.

Chosen by ``registry.py`` where the kernels could be built and know what the model needs; the same
model as ``decoder.py``, with an arithmetic of its own.  A forward is one call, whatever its size:
a product has the same bits at every number of rows, so nothing is padded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.attention.cpu import batch_of
from gpu_worker.attention.interface import AttentionLayer, AttentionMetadata
from gpu_worker.kernels.attention import KVLayer, Shape
from gpu_worker.kernels.decoder import DecoderCall, DecoderLayer, DecoderModel, Product
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.cpu_kernels import CpuKernels
from gpu_worker.models.decoder_config import DecoderConfig, inverse_frequencies
from gpu_worker.models.decoder_parts import DecoderParts, LayerParts
from gpu_worker.models.spec import ModelSpec, RowProduct
from gpu_worker.picking import Picker


class KernelProduct(RowProduct, Protocol):
    """A product that a call into the kernels can run among others."""

    def structure(self) -> Product:
        """Its weight as they see it, and what it wants its rows as."""
        ...


class KernelDecoder:
    """The whole model; the tensors that the kernels are given addresses of are kept here."""

    pads_rows = False
    slower_because: str | None = None

    def __init__(self, config: DecoderConfig, parts: DecoderParts, kernels: CpuKernels, *, max_model_len: int,
                 eos_token_ids: tuple[int, ...], picker: Picker, kv_dtype: torch.dtype | None = None) -> None:
        self.attention, self.picker, self.weights_fingerprint = kernels.attention, picker, parts.fingerprint
        self._top, self._layers = parts.top(), [parts.layer(index) for index in range(config.num_layers)]
        angles = torch.arange(max_model_len).float()[:, None] * inverse_frequencies(config)
        self._cos, self._sin = angles.cos(), angles.sin()
        dim = config.head_dim
        self.spec = ModelSpec(
            name=config.family, backend="decoder",
            layers=tuple(AttentionLayer(index, config.num_heads, config.num_kv_heads, dim, dim**-0.5, window)
                         for index, window in enumerate(config.windows)),
            hidden_size=config.hidden_size, vocab_size=config.vocab_size, max_model_len=config.max_position, dtype=parts.dtype,
            eos_token_ids=eos_token_ids, supports_bit_exact=True, quantization=parts.quantization, other_kv_dtype=kv_dtype or parts.kv_dtype)
        self._shapes = list(dict.fromkeys(map(_shape, self.spec.layers)))
        self.call = DecoderCall(kernels.library, self._model(config), kernels.num_threads)
        self._kv: tuple[KVCache, Sequence[KVLayer]] | None = None

    def _model(self, config: DecoderConfig) -> DecoderModel:
        layers = (DecoderLayer * config.num_layers)(*map(self._layer, range(config.num_layers)))
        top = self._top
        return DecoderModel(
            layers, top.embedding.data_ptr(), top.norm.data_ptr(), self._cos.data_ptr(), self._sin.data_ptr(),
            config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
            config.rms_norm_eps, config.head_dim**-0.5, top.embedding.dtype == torch.bfloat16, self.spec.dtype == torch.bfloat16)

    def _layer(self, index: int) -> DecoderLayer:
        parts = self._layers[index]
        return DecoderLayer(
            *(product.structure() for product in _products(parts)), parts.input_norm.data_ptr(), parts.mlp_norm.data_ptr(),
            _address(parts.query_norm), _address(parts.key_norm), self._shapes.index(_shape(self.spec.layers[index])))

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, attn: AttentionMetadata, kv: KVCache) -> Tensor:
        real = slice(attn.num_tokens)
        normed = torch.empty(attn.num_tokens, self.spec.hidden_size, dtype=self.spec.dtype)
        batch = batch_of(attn)
        plans = [self.attention.plan(Shape(*shape), batch) for shape in self._shapes]
        self.call(token_ids[real], positions[real], attn.slot_mapping[real], self._kv_layers(kv), plans, normed)
        self.attention.keep(plans)
        return normed

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._top.head(hidden)

    def linears(self) -> list[RowProduct]:
        return [product for parts in self._layers for product in _products(parts)]

    def head(self) -> RowProduct:
        return self._top.head

    def _kv_layers(self, kv: KVCache) -> Sequence[KVLayer]:
        """One a layer; made once for a cache."""
        if self._kv is None or self._kv[0] is not kv:
            self._kv = kv, (KVLayer * len(kv.layers))(*map(KVLayer.of, kv.layers))
        return self._kv[1]


def _shape(layer: AttentionLayer) -> tuple[int, int, int, int]:
    return layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.window or 0


def _products(parts: LayerParts) -> tuple[KernelProduct, ...]:
    """In the order of the kernels' structure."""
    return parts.qkv, parts.output, parts.gate_up, parts.down


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
