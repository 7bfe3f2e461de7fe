"""A decoder's parts with quantized weights.

Made by ``models/registry.py``.  Plain torch (``models/decoder.py``) maps tensors from files
(``tensor_files.py``); for the kernels they stand there in another order (``models/packed_files.py``).
Between the products activations are float32; K and V are bfloat16 unless float32 is asked for: the
cache is storage, whatever the CPU multiplies fast.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.models.decoder_config import DecoderConfig
from gpu_worker.models.decoder_parts import PROJECTIONS, LayerParts, TopParts
from gpu_worker.models.kernel_parts import KernelProducts
from gpu_worker.models.packed_parts import PackedParts
from gpu_worker.models.spec import RowProduct
from gpu_worker.models.weights import files_fingerprint
from gpu_worker.quantization import tensor_files
from gpu_worker.quantization.modes import MODES, prepared
from gpu_worker.quantization.products import QuantizedLinear


class QuantizedParts:
    """The parts of the model in ``model_dir``, quantized; made at its first use."""

    dtype = torch.float32

    def __init__(self, mode: str, model_dir: Path, config: DecoderConfig, dtype: str) -> None:
        self.quantization = mode
        self.kv_dtype = _kv_dtype(dtype)
        self._folder, self._groups = prepared(mode, model_dir, config, packed=False), MODES[mode].groups
        self.fingerprint = _fingerprint(model_dir, self._folder, config)

    def top(self) -> TopParts:
        tensors = tensor_files.read(self._folder, tensor_files.TOP)
        return TopParts(tensors["embedding"], tensors["norm"], self._linear("head", tensors))

    def layer(self, index: int) -> LayerParts:
        tensors = tensor_files.read(self._folder, tensor_files.layer_name(index))
        return LayerParts(**{name: tensors.get(name) for name in tensor_files.NORMS},
                          **{name: self._linear(name, tensors) for name in PROJECTIONS})

    def _linear(self, name: str, tensors: dict[str, Tensor]) -> RowProduct:
        return QuantizedLinear(*tensor_files.linear_from(name, tensors), self._groups.get(name))


def packed_quantized(mode: str, model_dir: Path, config: DecoderConfig, dtype: str, products: KernelProducts) -> PackedParts:
    """The same for the kernels."""
    folder = prepared(mode, model_dir, config, packed=True)
    return PackedParts(folder, config, products, dtype=torch.float32, kv_dtype=_kv_dtype(dtype), quantization=mode,
                       fingerprint=_fingerprint(model_dir, folder, config), groups=MODES[mode].groups)


def _kv_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "float32" else torch.bfloat16


def _fingerprint(model_dir: Path, folder: Path, config: DecoderConfig) -> str:
    names = (tensor_files.TOP, *map(tensor_files.layer_name, range(config.num_layers)))
    return files_fingerprint([model_dir / "config.json", *(tensor_files.path(folder, name) for name in names)])
