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
from gpu_worker.kernels.linear import Weight, described
from gpu_worker.models import packed_files
from gpu_worker.models.converted import models_dir
from gpu_worker.models.decoder_config import DecoderConfig
from gpu_worker.models.decoder_parts import PROJECTIONS, LayerParts, TopParts, projection_shapes, weight_bytes
from gpu_worker.models.kernel_parts import KernelLinear, KernelProducts
from gpu_worker.models.kept_weights import kept
from gpu_worker.models.weights import Checkpoint, fingerprint
from gpu_worker.quantization.tensor_files import NORMS, TOP, layer_name

HEAD_NORMS = ("query_norm", "key_norm")       # of each head's rows, where the config says so
logger = logging.getLogger(__name__)


class PackedParts:
    """The parts of the model in ``folder``; ``groups``: product → inputs of its rows that share a scale."""

    def __init__(self, folder: Path, config: DecoderConfig, products: KernelProducts, *, dtype: torch.dtype, kv_dtype: torch.dtype,
                 quantization: str | None, fingerprint: str, groups: dict[str, int]) -> None:
        self.dtype, self.kv_dtype, self.quantization, self.fingerprint = dtype, kv_dtype, quantization, fingerprint
        self._files = packed_files.PackedFiles(folder, config.num_layers)
        self._config, self._products, self._groups = config, products, groups
        shapes = {name: (sum(out for out, _ in parts), parts[0][1]) for name, parts in projection_shapes(config).items()}
        self._shapes = shapes | {"head": (config.vocab_size, config.hidden_size)}      # product → [out, in]

    def top(self) -> TopParts:
        tensors, config = self._files.read(TOP), self._config
        embedding = self._plain(TOP, "embedding", tensors, torch.bfloat16, (config.vocab_size, config.hidden_size))
        norm = self._plain(TOP, "norm", tensors, self.dtype, (config.hidden_size,))
        return TopParts(embedding, norm, self._product(TOP, "head", tensors, torch.float32))

    def layer(self, index: int) -> LayerParts:
        file, config = layer_name(index), self._config
        tensors = self._files.read(file)
        widths = dict.fromkeys(NORMS, config.hidden_size) | dict.fromkeys(HEAD_NORMS, config.head_dim)
        norms = {name: None if name in HEAD_NORMS and not config.qk_norm else self._plain(file, name, tensors, self.dtype, (width,))
                 for name, width in widths.items()}
        return LayerParts(**norms, **{name: self._product(file, name, tensors, self.dtype) for name in PROJECTIONS})

    def _plain(self, file: str, name: str, tensors: dict[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor that is no product's; ModelError where it is not what the config asks for: the kernels are given addresses only."""
        if name not in tensors:
            raise self._files.unreadable(file, f"{name} is missing")
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.shape != shape:
            raise self._files.unreadable(file, f"{name}: was {described(tensor.dtype, tensor.shape)};"
                                               f" the config asks for {described(dtype, shape)}")
        return tensor

    def _product(self, file: str, name: str, tensors: dict[str, Tensor], output_dtype: torch.dtype) -> KernelLinear:
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        try:
            weight = Weight.from_tensors(own)
        except ValueError as error:
            raise self._files.unreadable(file, f"{name}: {error}") from None
        n, k = self._shapes[name]
        if (weight.n, weight.k) != (n, k):
            raise self._files.unreadable(file, f"{name}: was {weight.k} inputs and {weight.n} outputs; the config asks for {k} and {n}")
        return self._products.product(weight, self._groups.get(name), output_dtype)


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
