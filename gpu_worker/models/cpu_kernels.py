"""Whether a model runs on the compiled kernels here, and what they are made into for it.

Asked by ``registry.py``.  Where they cannot be had there is a reason to be told, and plain
torch computes the same model more slowly, in an arithmetic of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from gpu_worker.attention.cpu import CpuAttention
from gpu_worker.attention.interface import AttentionBackend, AttentionLayer
from gpu_worker.attention.reference import ReferenceAttention
from gpu_worker.kernels.build import KernelsUnavailable
from gpu_worker.kernels.elementwise import GROUP
from gpu_worker.kernels.library import Library
from gpu_worker.kernels.linear import MAX_INPUTS
from gpu_worker.kernels.picker import KernelPicker
from gpu_worker.models.decoder_config import DecoderConfig
from gpu_worker.models.decoder_parts import projection_shapes
from gpu_worker.models.kernel_parts import KernelProducts
from gpu_worker.picking import Picker, TorchPicker

DISABLED = "FOLOVLLM_DISABLE_KERNELS"


@dataclass(frozen=True, slots=True)
class CpuKernels:
    """The library, and its parts for a number of threads."""

    library: Library
    num_threads: int
    attention: CpuAttention
    products: KernelProducts
    picker: KernelPicker

    @classmethod
    def open(cls, device: torch.device, num_threads: int) -> tuple[CpuKernels | None, str | None]:
        """They, or why not; neither on other devices and where the environment switches them off."""
        if device.type != "cpu" or os.environ.get(DISABLED) == "1":
            return None, None
        try:
            library = Library.open()
        except KernelsUnavailable as error:
            return None, str(error)
        return cls(library, num_threads, CpuAttention(library, num_threads), KernelProducts(library, num_threads),
                   KernelPicker(library, num_threads)), None

    @staticmethod
    def decoder_lacks(config: DecoderConfig, dtype: torch.dtype) -> str | None:
        """What the lean decoder needs for a model and they do not know; None: nothing."""
        widths = {shape[1] for shapes in projection_shapes(config).values() for shape in shapes}
        lacking = CpuAttention.lacks_heads(config.head_dim, dtype)
        if lacking is None and any(width % GROUP or width > MAX_INPUTS for width in widths):
            lacking = f"products of {sorted(widths)} inputs are not all multiples of {GROUP} up to {MAX_INPUTS}"
        return lacking


def attention_backend(kernels: CpuKernels | None, layers: tuple[AttentionLayer, ...], dtype: torch.dtype) -> tuple[AttentionBackend, str | None]:
    """The attention of a model whose other operators are torch's: the kernels' where there are any that know its heads, else why not."""
    lacking = [lacks for layer in layers if (lacks := CpuAttention.lacks_heads(layer.head_dim, dtype)) is not None]
    if kernels is None or lacking:
        return ReferenceAttention(), lacking[0] if kernels is not None else None
    return kernels.attention, None


def picker_of(kernels: CpuKernels | None) -> Picker:
    """The kernels' where there are any, whatever else runs on them; it knows all models."""
    return TorchPicker() if kernels is None else kernels.picker
