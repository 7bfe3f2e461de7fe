"""A decoder's products on the compiled kernels' weights.

Given to ``packed_parts.PackedParts``, whose weights are in the kernels' order, and to
``decoder_parts.PlainParts``, whose are put into it at load; used by ``kernel_decoder.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.kernels.decoder import Product
from gpu_worker.kernels.elementwise import Elementwise, Output
from gpu_worker.kernels.huge_pages import GrowingHugePages
from gpu_worker.kernels.library import Library
from gpu_worker.kernels.linear import INTEGERS, Linear, Weight, WeightKind
from gpu_worker.models.decoder_parts import Affine
from gpu_worker.models.spec import kind_of

KINDS = {torch.float32: WeightKind.FLOAT32, torch.bfloat16: WeightKind.BF16}
ROW_DTYPES = {kind: dtype for dtype, kind in KINDS.items()}


class KernelLinear:
    """x [rows, in_features], as it stands or quantized first → [rows, out_features]."""

    def __init__(self, library: Library, num_threads: int, weight: Weight, wanted: Output, input_dtype: torch.dtype,
                 output_dtype: torch.dtype) -> None:
        self.in_features, self.out_features, self.input_dtype = weight.k, weight.n, input_dtype
        blocks = "" if weight.k_block == weight.k else f" in blocks of {weight.k_block} inputs"
        self.kind = kind_of(f"{weight.kind.name}{blocks}, {wanted.name} to {output_dtype}", weight.bias)
        self.integers = INTEGERS.get(weight.kind)
        self._weight, self._wanted, self._output_dtype = weight, wanted, output_dtype
        self._library, self._threads = library, num_threads
        self._elementwise = Elementwise(library, num_threads)
        self._linear = Linear(library, weight, num_threads, output_dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x if self._wanted is Output.ROWS else self._elementwise.quantize(x, self._wanted))

    def of_integers(self, values: Tensor) -> KernelLinear:
        weight = Weight.from_integers(self._weight.kind, values)
        return KernelLinear(self._library, self._threads, weight, self._wanted, self.input_dtype, self._output_dtype)

    def structure(self) -> Product:
        """For a call that runs it among others; its addresses hold as long as this product lives."""
        return Product(self._weight.structure, self._wanted)


class KernelProducts:
    """Makes products for a number of threads."""

    def __init__(self, library: Library, num_threads: int) -> None:
        self._library, self._threads = library, num_threads
        self._pages = GrowingHugePages()

    def linear(self, affine: Affine) -> KernelLinear:
        dtype = affine.weight.dtype
        return self.product(self._packed(affine.weight, affine.bias), None, dtype)

    def head(self, weight: Tensor) -> KernelLinear:
        """→ float32 logits."""
        return self.product(self._packed(weight, None), None, torch.float32)

    def product(self, weight: Weight, group: int | None, output_dtype: torch.dtype) -> KernelLinear:
        """Rows for integer weights are float32, and have a scale each or (``group``) one for each 32 inputs."""
        if weight.kind in ROW_DTYPES:
            wanted, input_dtype = Output.ROWS, ROW_DTYPES[weight.kind]
        else:
            wanted, input_dtype = Output.PER_TOKEN if group is None else Output.PER_GROUP, torch.float32
        return KernelLinear(self._library, self._threads, weight, wanted, input_dtype, output_dtype)

    def _packed(self, weight: Tensor, bias: Tensor | None) -> Weight:
        return Weight.from_float(KINDS[weight.dtype], weight, bias).moved(self._pages)
