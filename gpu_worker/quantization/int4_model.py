"""What becomes of a model under ``--quantization int4``.

Called by ``modes.py``.  Weights of 4 bits in blocks of 32 inputs: those of the GGUF file that the
checkpoint was converted from, where it has such (the file is kept beside the checkpoint), else made
from the checkpoint.  Blocks cannot be rotated, so all rows have a scale for each 32 inputs.  The
head has 8 bits, in blocks likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_worker.models.converted import GGUF_NAME
from gpu_worker.models.decoder_config import DecoderConfig
from gpu_worker.models.decoder_parts import PROJECTIONS, projection_shapes, read_layer, read_top
from gpu_worker.models.spec import ModelError
from gpu_worker.models.weights import Checkpoint
from gpu_worker.quantization.blocks import Block4Weight, Block8Weight
from gpu_worker.quantization.rows import GROUP
from gpu_worker.quantization.tensor_files import TOP, layer_name, linear_tensors, norm_tensors, top_tensors

VERSION = 1                                                   # of what is made here
GROUPS = dict.fromkeys((*PROJECTIONS, "head"), GROUP)         # all products' rows have a scale for each so many inputs
CPU = torch.device("cpu")


def tensors(checkpoint: Checkpoint, config: DecoderConfig, model_dir: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(file, its tensors): the ends of the model, then each layer."""
    blocks = _FileBlocks(model_dir / GGUF_NAME, config)
    top = read_top(checkpoint, config, torch.float32, CPU)
    yield TOP, top_tensors(top) | linear_tensors("head", _head(blocks, top.head))
    for index in range(config.num_layers):
        layer = read_layer(checkpoint, config, index, torch.float32, CPU)
        found = norm_tensors(layer)
        for product in PROJECTIONS:
            affine = getattr(layer, product)
            found |= linear_tensors(product, _blocks4(blocks, index, product, affine.weight, config), affine.bias)
        yield layer_name(index), found


def _head(blocks: _FileBlocks, weight: Tensor) -> Block8Weight:
    found = blocks.head(weight.shape)
    if found is None:
        return Block8Weight.from_float(weight)
    return _checked(blocks, Block8Weight.from_gguf(found), weight, "lm_head")


def _blocks4(blocks: _FileBlocks, index: int, product: str, weight: Tensor, config: DecoderConfig) -> Block4Weight:
    """The projections of a product, each from the file or from its part of ``weight``."""
    parts = weight.split([shape[0] for shape in projection_shapes(config)[product]])
    found = []
    for name, part in zip(PROJECTIONS[product], parts, strict=True):
        packed = blocks.projection(index, name, part.shape)
        if packed is None:
            found.append(Block4Weight.from_float(part))
        else:
            found.append(_checked(blocks, Block4Weight.from_gguf(*packed), part, f"model.layers.{index}.{name}"))
    return Block4Weight(*(torch.cat([getattr(part, field) for part in found]) for field in ("nibbles", "scales", "minimums")))


def _checked(blocks: _FileBlocks, weight: Any, checkpoint: Tensor, name: str) -> Any:
    """``weight``, when it is what the checkpoint was made of: converted tensors are bfloat16."""
    if weight.shape != tuple(checkpoint.shape) or not torch.equal(weight.dequantized().bfloat16(), checkpoint.bfloat16()):
        raise blocks.refused(f"{name} differs from the checkpoint beside it")
    return weight


class _FileBlocks:
    """The GGUF file's own blocks, in the order of the checkpoint's rows; none where there is no file."""

    def __init__(self, path: Path, config: DecoderConfig) -> None:
        self._path = path
        self._tensors: dict[str, Any] = {}
        self._head_dim = config.head_dim if config.family == "llama" else None     # Q and K are permuted
        if path.is_symlink() and not path.exists():
            raise ModelError(f"{path.readlink()}: no such file; --quantization int4 takes the blocks of the file"
                             " that the checkpoint was converted from")
        if path.exists():
            from gguf import GGUFReader

            try:
                self._tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
            except OSError:
                raise
            except Exception as error:     # a damaged file makes the reader raise anything
                raise self.refused(f"not a readable GGUF file: {type(error).__name__}: {error}") from None

    def refused(self, why: str) -> ModelError:
        """What is said of the file."""
        return ModelError(f"{self._path}: {why}; allowed: the file that the checkpoint was converted from")

    def projection(self, index: int, name: str, shape: tuple[int, ...]) -> tuple[str, np.ndarray] | None:
        """(Q4_0 or Q4_1, bytes [out, …]) of a weight of ``shape``; None for another type."""
        if not self._tensors:
            return None
        from gpu_worker.models.gguf_tensors import LAYER_NAMES, unpermuted

        short = next(short for short, long in LAYER_NAMES.items() if long == name)
        tensor = self._of_shape(f"blk.{index}.{short}.weight", shape)
        if tensor.tensor_type.name not in ("Q4_0", "Q4_1"):
            return None
        data = np.array(tensor.data)
        if self._head_dim is not None and short in ("attn_q", "attn_k"):
            data = np.ascontiguousarray(unpermuted(data, self._head_dim))
        return tensor.tensor_type.name, data

    def head(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """Bytes [vocab, …] of Q8_0; None for another type."""
        if not self._tensors:
            return None
        tensor = self._of_shape("output.weight" if "output.weight" in self._tensors else "token_embd.weight", shape)
        return np.array(tensor.data) if tensor.tensor_type.name == "Q8_0" else None

    def _of_shape(self, name: str, shape: tuple[int, ...]) -> Any:
        if name not in self._tensors:
            raise self.refused(f"{name} is missing")
        found = [int(size) for size in reversed(self._tensors[name].shape)]
        if found != list(shape):
            raise self.refused(f"{name} has shape {found}, the checkpoint beside it {list(shape)}")
        return self._tensors[name]
