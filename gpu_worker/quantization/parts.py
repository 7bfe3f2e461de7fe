"""A decoder's parts with quantized weights.

Made by ``models/registry.py``, asked by ``models/decoder.py``.  Tensors are mapped from files
(``tensor_files.py``).  Between the products activations are float32; K and V are bfloat16 unless
float32 is asked for: the cache is storage, whatever the CPU multiplies fast.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.models.decoder_config import DecoderConfig
from gpu_worker.models.decoder_parts import PROJECTIONS, LayerParts, TopParts
from gpu_worker.models.spec import RowProduct
from gpu_worker.models.weights import files_fingerprint
from gpu_worker.quantization import tensor_files
from gpu_worker.quantization.modes import MODES, prepared
from gpu_worker.quantization.products import Weight

QuantizedProduct = Callable[[Weight, Tensor | None, int | None], RowProduct]     # of weight, bias, inputs that share a scale


class QuantizedParts:
    """The parts of the model in ``model_dir``, quantized; made at its first use."""

    dtype = torch.float32

    def __init__(self, mode: str, model_dir: Path, config: DecoderConfig, dtype: str, product: QuantizedProduct) -> None:
        self.quantization = mode
        self._product = product
        self.kv_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self._folder, self._groups = prepared(mode, model_dir, config), MODES[mode].groups
        files = [tensor_files.path(self._folder, name)
                 for name in (tensor_files.TOP, *map(tensor_files.layer_name, range(config.num_layers)))]
        self.fingerprint = files_fingerprint([model_dir / "config.json", *files])

    def top(self) -> TopParts:
        tensors = tensor_files.read(self._folder, tensor_files.TOP)
        return TopParts(tensors["embedding"], tensors["norm"], self._linear("head", tensors))

    def layer(self, index: int) -> LayerParts:
        tensors = tensor_files.read(self._folder, tensor_files.layer_name(index))
        return LayerParts(**{name: tensors.get(name) for name in tensor_files.NORMS},
                          **{name: self._linear(name, tensors) for name in PROJECTIONS})

    def _linear(self, name: str, tensors: dict[str, Tensor]) -> RowProduct:
        return self._product(*tensor_files.linear_from(name, tensors), self._groups.get(name))
