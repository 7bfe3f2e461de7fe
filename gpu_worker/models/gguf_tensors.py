"""A GGUF file's tensors as model.safetensors.

Used by ``gguf_checkpoint``.  One tensor at a time is in memory, so the model may be larger
than that.  Floats keep their type; quantized values become bfloat16.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, dequantize, quantize
from rich.console import Console
from rich.progress import track

from gpu_worker.models.converted import ConversionError

LAYER_NAMES = {       # GGUF → checkpoint
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"     # part of the config, not of the weights
BYTES_PER_VALUE = {"F32": 4, "F16": 2, "BF16": 2}
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_type(tensor: Any) -> str:
    """The safetensors type that ``tensor`` is written in."""
    kind = tensor.tensor_type.name
    return kind if kind in ("F32", "F16") else "BF16"


def write(tensors: dict[str, Any], path: Path, permuted_head_dim: int | None) -> None:
    """All tensors, by their names in a checkpoint.

    With ``permuted_head_dim`` the rows of Q and K are put back in order, head by head.
    """
    # Widest values first: each tensor then starts at a multiple of its value size.
    named = sorted(((checkpoint_name(name), name, tensor) for name, tensor in tensors.items() if name != ROPE_FACTORS),
                   key=lambda entry: (-BYTES_PER_VALUE[stored_type(entry[2])], entry[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, _, tensor in named:
        start, shape = end, [int(size) for size in reversed(tensor.shape)]
        end += math.prod(shape) * BYTES_PER_VALUE[stored_type(tensor)]
        header[name] = {"dtype": stored_type(tensor), "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, name, tensor in track(named, "converting", console=Console(stderr=True), disable=not sys.stderr.isatty()):
            values = _values(name, tensor)
            if permuted_head_dim and name.split(".")[-2] in ("attn_q", "attn_k"):
                values = unpermuted(values, permuted_head_dim)
            out.write(_encoded(values, stored_type(tensor)).data)


def checkpoint_name(name: str) -> str:
    """What a GGUF tensor is called in a checkpoint; ConversionError for one without a place."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in TOP_NAMES:
        return f"{TOP_NAMES[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ConversionError(f"tensor {name}: this architecture has no place for it")


def unpermuted(values: np.ndarray, head_dim: int) -> np.ndarray:
    """[heads × head_dim, …]: GGUF has the two halves that RoPE turns interleaved in each head."""
    pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _values(name: str, tensor: Any) -> np.ndarray:
    """float32, in the shape that a checkpoint has."""
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ConversionError(f"tensor {name}: the type {tensor.tensor_type.name} is not supported") from None


def _encoded(values: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of ``values`` (float32) in ``kind``."""
    if kind == "BF16":
        return np.ascontiguousarray(quantize(values, GGMLQuantizationType.BF16))
    return np.ascontiguousarray(values, "<f4" if kind == "F32" else "<f2")
