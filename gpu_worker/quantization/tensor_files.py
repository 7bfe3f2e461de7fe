"""How quantized tensors are called and stored: one safetensors file for the ends of a model and for each layer.

Written by ``modes.py`` from what ``int8_model.py`` and ``int4_model.py`` make, read by ``parts.py``.
The ends have ``embedding`` bfloat16 [vocab, hidden] (a rounding far below that of int8 rows), ``norm``
and the product ``head``; a layer has its norms and the products of ``PROJECTIONS``.  Norms and biases
are float32.  A product ``name`` has ``name.bias``, perhaps, and the fields of its weight:

- ``values`` int8 [out, in], ``scales`` float32 [out]                                 ``ChannelWeight``
- ``values`` int8 [out, in], ``scales`` float16 [out, in // 32]                       ``Block8Weight``
- ``nibbles`` uint8 [out, in // 32, 16], ``scales``, ``minimums`` float16 [out, in // 32]   ``Block4Weight``
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gpu_worker.models.decoder_parts import LayerTensors, TopTensors
from gpu_worker.models.kept_weights import save
from gpu_worker.quantization.blocks import Block4Weight, Block8Weight
from gpu_worker.quantization.channels import ChannelWeight
from gpu_worker.quantization.products import Weight

TOP = "top"
NORMS = ("input_norm", "query_norm", "key_norm", "mlp_norm")


def layer_name(index: int) -> str:
    return f"layer.{index}"


def top_tensors(top: TopTensors) -> dict[str, Tensor]:
    """The ends of the model, but for the head."""
    return {"embedding": top.embedding.bfloat16(), "norm": top.norm}


def norm_tensors(layer: LayerTensors) -> dict[str, Tensor]:
    """The norms that the layer has."""
    return {name: norm for name in NORMS if (norm := getattr(layer, name)) is not None}


def linear_tensors(name: str, weight: Weight, bias: Tensor | None = None) -> dict[str, Tensor]:
    """A product's tensors, by their names in a file."""
    found = {f"{name}.{field.name}": getattr(weight, field.name) for field in dataclasses.fields(weight)}
    return found if bias is None else found | {f"{name}.bias": bias}


def linear_from(name: str, tensors: dict[str, Tensor]) -> tuple[Weight, Tensor | None]:
    """The weight and the bias of a product."""
    if f"{name}.nibbles" in tensors:
        kind: Any = Block4Weight
    else:
        kind = ChannelWeight if tensors[f"{name}.scales"].dtype == torch.float32 else Block8Weight
    return kind(*(tensors[f"{name}.{field.name}"] for field in dataclasses.fields(kind))), tensors.get(f"{name}.bias")


def write(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    save(tensors, path(folder, name))


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file, mapped."""
    with safe_open(path(folder, name), framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}


def path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
