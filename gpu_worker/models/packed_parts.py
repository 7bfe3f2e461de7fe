"""A decoder's parts from weights that stand on disk in the kernels' order.

Made by ``models/registry.py`` where the kernels run the model, asked by ``models/kernel_decoder.py``.
A start copies weights into memory and does nothing else with them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.kernels import panels
from gpu_worker.kernels.linear import Weight
from gpu_worker.models import packed_files
from gpu_worker.models.converted import models_dir
from gpu_worker.models.decoder_config import DecoderConfig
from gpu_worker.models.decoder_parts import PROJECTIONS, LayerParts, TopParts, weight_bytes
from gpu_worker.models.kernel_parts import KernelLinear, KernelProducts
from gpu_worker.models.kept_weights import kept
from gpu_worker.models.weights import Checkpoint, fingerprint
from gpu_worker.quantization.tensor_files import NORMS, TOP, layer_name

logger = logging.getLogger(__name__)


class PackedParts:
    """The parts of the model in ``folder``; ``groups``: product → inputs of its rows that share a scale."""

    def __init__(self, folder: Path, config: DecoderConfig, products: KernelProducts, *, dtype: torch.dtype, kv_dtype: torch.dtype,
                 quantization: str | None, fingerprint: str, groups: dict[str, int]) -> None:
        self.dtype, self.kv_dtype, self.quantization, self.fingerprint = dtype, kv_dtype, quantization, fingerprint
        self._files = packed_files.PackedFiles(folder, config.num_layers)
        self._products, self._groups = products, groups

    def top(self) -> TopParts:
        tensors = self._files.read(TOP)
        return TopParts(tensors["embedding"], tensors["norm"], self._product("head", tensors, torch.float32))

    def layer(self, index: int) -> LayerParts:
        tensors = self._files.read(layer_name(index))
        return LayerParts(**{name: tensors.get(name) for name in NORMS},
                          **{name: self._product(name, tensors, self.dtype) for name in PROJECTIONS})

    def _product(self, name: str, tensors: dict[str, Tensor], output_dtype: torch.dtype) -> KernelLinear:
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        return self._products.product(Weight.from_tensors(own), self._groups.get(name), output_dtype)


def keeps_packed(model_dir: Path, dtype: torch.dtype) -> bool:
    """Whether a packed copy of the checkpoint may stand beside it: where it is a copy itself, converted into the cache directory."""
    return dtype == torch.bfloat16 and model_dir.parent == models_dir()


def packed_checkpoint(model_dir: Path, config: DecoderConfig, products: KernelProducts) -> PackedParts:
    """The checkpoint in bfloat16; packed if it is not yet."""
    def make(target: Path) -> None:
        logger.info("%s: putting weights into the kernels' order", model_dir)
        with Checkpoint(model_dir) as checkpoint:
            for name, tensors in packed_files.checkpoint_tensors(checkpoint, config):
                packed_files.write(target, name, tensors)
            checkpoint.ignore("rotary_emb.inv_freq")
            checkpoint.check_all_taken()

    source = fingerprint(model_dir)
    folder = kept(f"bfloat16-{source[:16]}-{panels.LAYOUT}", make, weight_bytes(config, 2.0, 2.0))
    return PackedParts(folder, config, products, dtype=torch.bfloat16, kv_dtype=torch.bfloat16, quantization=None, fingerprint=source,
                       groups={})
