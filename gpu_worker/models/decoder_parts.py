"""What the lean decoder is put together from: its tensors, and its products ready to run.

``decoder.py`` asks a ``DecoderParts`` for them, layer by layer, and does not know whether the
weights stand as in the checkpoint (``PlainParts``) or quantized (``quantization/parts.py``).
``read_layer`` and ``read_top`` name each tensor of a Llama-family checkpoint, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.models.decoder_config import DecoderConfig
from gpu_worker.models.layers import Linear, LMHead
from gpu_worker.models.spec import ModelError, RowProduct
from gpu_worker.models.weights import Checkpoint

PROJECTIONS = {      # product → its projections in the checkpoint, which all take the same input
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}


@dataclass(frozen=True, slots=True)
class Affine:
    """x → x · weightᵀ + bias, as numbers."""

    weight: Tensor           # [out, in]
    bias: Tensor | None      # [out]


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The tensors of one decoder layer."""

    input_norm: Tensor       # [hidden]
    qkv: Affine              # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    query_norm: Tensor | None   # [head_dim]
    key_norm: Tensor | None     # [head_dim]
    output: Affine           # [hidden, num_heads * head_dim]
    mlp_norm: Tensor         # [hidden]
    gate_up: Affine          # [2 * intermediate, hidden]: gate, then up
    down: Affine             # [hidden, intermediate]


@dataclass(frozen=True, slots=True)
class TopTensors:
    """What stands before the first layer and behind the last."""

    embedding: Tensor        # [vocab, hidden]
    norm: Tensor             # [hidden]
    head: Tensor             # [vocab, hidden]; the embedding itself where it is tied


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One decoder layer, ready to run."""

    input_norm: Tensor       # [hidden]
    qkv: RowProduct
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: RowProduct
    mlp_norm: Tensor         # [hidden]
    gate_up: RowProduct
    down: RowProduct


@dataclass(frozen=True, slots=True)
class TopParts:
    """The ends of the model, ready to run."""

    embedding: Tensor        # [vocab, hidden]; its rows are turned into the activations' dtype
    norm: Tensor             # [hidden]
    head: RowProduct         # → float32 logits


class DecoderParts(Protocol):
    """Where a decoder takes its parts from, each once, in order."""

    dtype: torch.dtype            # of the activations between operators
    kv_dtype: torch.dtype
    quantization: str | None      # of the weights
    fingerprint: str              # of everything that is in the parts

    def top(self) -> TopParts: ...

    def layer(self, index: int) -> LayerParts: ...


class Products(Protocol):
    """Makes of numbers what multiplies rows with them."""

    def linear(self, affine: Affine) -> RowProduct: ...

    def head(self, weight: Tensor) -> RowProduct:
        """→ float32 logits."""
        ...


class TorchProducts:
    """By torch's own libraries."""

    def linear(self, affine: Affine) -> Linear:
        return Linear(affine.weight, affine.bias)

    def head(self, weight: Tensor) -> LMHead:
        return LMHead(weight)


class PlainParts:
    """The checkpoint's own weights, in one dtype."""

    quantization = None

    def __init__(self, checkpoint: Checkpoint, config: DecoderConfig, dtype: torch.dtype, device: torch.device, fingerprint: str,
                 products: Products) -> None:
        self.dtype = self.kv_dtype = dtype
        self._products = products
        self.fingerprint = fingerprint
        self._checkpoint, self._config, self._device = checkpoint, config, device

    def top(self) -> TopParts:
        top = read_top(self._checkpoint, self._config, self.dtype, self._device)
        return TopParts(top.embedding, top.norm, self._products.head(top.head))

    def layer(self, index: int) -> LayerParts:
        layer = read_layer(self._checkpoint, self._config, index, self.dtype, self._device)
        products = {name: self._products.linear(getattr(layer, name)) for name in PROJECTIONS}
        return LayerParts(input_norm=layer.input_norm, query_norm=layer.query_norm, key_norm=layer.key_norm, mlp_norm=layer.mlp_norm,
                          **products)


def read_top(checkpoint: Checkpoint, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> TopTensors:
    """ModelError where a tied head is none."""
    shape = (config.vocab_size, config.hidden_size)
    embedding = head = checkpoint.take("model.embed_tokens.weight", shape, dtype, device)
    if not config.tied_head or "lm_head.weight" in checkpoint:
        head = checkpoint.take("lm_head.weight", shape, dtype, device)
        if config.tied_head and not torch.equal(head, embedding):
            raise ModelError("tie_word_embeddings: was true, but lm_head.weight differs from model.embed_tokens.weight")
    return TopTensors(embedding, checkpoint.take("model.norm.weight", (config.hidden_size,), dtype, device), head)


def read_layer(checkpoint: Checkpoint, config: DecoderConfig, index: int, dtype: torch.dtype, device: torch.device) -> LayerTensors:
    """The tensors of layer ``index``, projections of one input together."""
    def take(name: str, *shape: int) -> Tensor:
        return checkpoint.take(f"model.layers.{index}.{name}", shape, dtype, device)

    def affine(product: str) -> Affine:
        names = PROJECTIONS[product]
        weights = [take(f"{name}.weight", *shape) for name, shape in zip(names, shapes[product], strict=True)]
        biases = [take(f"{name}.bias", shape[0]) for name, shape in zip(names, shapes[product], strict=True)] if biased[product] else None
        return Affine(torch.cat(weights), torch.cat(biases) if biases else None)

    hidden, dim, shapes = config.hidden_size, config.head_dim, projection_shapes(config)
    biased = {"qkv": config.qkv_bias, "output": config.output_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    return LayerTensors(
        input_norm=take("input_layernorm.weight", hidden), mlp_norm=take("post_attention_layernorm.weight", hidden),
        query_norm=take("self_attn.q_norm.weight", dim) if config.qk_norm else None,
        key_norm=take("self_attn.k_norm.weight", dim) if config.qk_norm else None,
        **{product: affine(product) for product in PROJECTIONS})


def projection_shapes(config: DecoderConfig) -> dict[str, tuple[tuple[int, int], ...]]:
    """Product → [out, in] of each of its projections."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {"qkv": ((query, hidden), (kv, hidden), (kv, hidden)), "output": ((hidden, query),),
            "gate_up": ((inner, hidden), (inner, hidden)), "down": ((hidden, inner),)}


def weight_bytes(config: DecoderConfig, each: float, each_of_head: float) -> int:
    """About what the model's files take, when so many bytes hold a weight and the embedding is bfloat16."""
    layer = sum(out * inputs for shapes in projection_shapes(config).values() for out, inputs in shapes)
    return int(config.num_layers * layer * each + config.vocab_size * config.hidden_size * (2 + each_of_head))
