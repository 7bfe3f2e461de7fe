"""The quantized modes: what they are good for, and their tensors, made once and found again.

Called by ``models/registry.py`` at start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.kernels import panels
from gpu_worker.models import packed_files
from gpu_worker.models.converted import GGUF_NAME
from gpu_worker.models.decoder_config import DecoderConfig
from gpu_worker.models.decoder_parts import projection_shapes, weight_bytes
from gpu_worker.models.kept_weights import kept
from gpu_worker.models.spec import ModelError
from gpu_worker.models.weights import Checkpoint, fingerprint
from gpu_worker.quantization import int4_model, int8_model, tensor_files
from gpu_worker.quantization.rows import GROUP

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mode:
    """How a model is quantized, and how its products take their rows."""

    tensors: Callable[[Checkpoint, DecoderConfig, Path], Iterator[tuple[str, dict[str, Tensor]]]]
    groups: dict[str, int]         # product → inputs that share a scale; others: a row
    version: int                   # of what is made
    bytes_each: float              # of a weight: its own, and its share of scales and minimums
    bytes_each_of_head: float


MODES = {"int8": Mode(int8_model.tensors, int8_model.GROUPS, int8_model.VERSION, 1.0, 1.0),
         "int4": Mode(int4_model.tensors, int4_model.GROUPS, int4_model.VERSION, 20 / 32, 34 / 32)}


def check_supported(mode: str, config: DecoderConfig, dtype: str, device: torch.device) -> None:
    """ModelError names what the mode does not go with."""
    if device.type != "cpu":
        raise ModelError(f"quantization: was {mode!r} on {device.type}; allowed: with device 'cpu'")
    if dtype == "float16":
        raise ModelError(f"quantization: was {mode!r} beside dtype 'float16'; allowed: with dtype auto, float32 or bfloat16")
    for product, shapes in projection_shapes(config).items():
        if shapes[0][1] % GROUP:
            raise ModelError(f"quantization: was {mode!r}, but {product} of this model has {shapes[0][1]} inputs;"
                             f" allowed: with multiples of {GROUP}")


def prepared(mode: str, model_dir: Path, config: DecoderConfig, *, packed: bool) -> Path:
    """The directory with the tensors of ``tensor_files``, or (``packed``) of ``packed_files``; made if it is not there."""
    source = f"{fingerprint(model_dir)[:16]}{'-gguf' if (model_dir / GGUF_NAME).exists() else ''}"
    chosen = MODES[mode]
    name = f"{mode}-{source}-v{chosen.version}{f'-{panels.LAYOUT}' if packed else ''}"
    return kept(name, lambda target: _make(mode, model_dir, config, target, packed),
                weight_bytes(config, chosen.bytes_each, chosen.bytes_each_of_head))


def _make(mode: str, model_dir: Path, config: DecoderConfig, target: Path, packed: bool) -> None:
    logger.info("%s: quantizing to %s", model_dir, mode)
    with Checkpoint(model_dir) as checkpoint:
        for name, tensors in MODES[mode].tensors(checkpoint, config, model_dir):
            if packed:
                packed_files.write(target, name, packed_files.packed_tensors(name, tensors))
            else:
                tensor_files.write(target, name, tensors)
        checkpoint.ignore("rotary_emb.inv_freq")
        checkpoint.check_all_taken()
