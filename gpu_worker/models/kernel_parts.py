"""A decoder's products on the compiled kernels' weights.

Given to ``decoder_parts.PlainParts`` and ``quantization.parts.QuantizedParts``, which say what is
multiplied; used by ``kernel_decoder.py``.  Weights are put into the kernels' order at load.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.kernels import panels
from gpu_worker.kernels.decoder import Product
from gpu_worker.kernels.elementwise import Elementwise, Output
from gpu_worker.kernels.library import Library
from gpu_worker.kernels.linear import Linear, Weight, WeightKind
from gpu_worker.models.decoder_parts import Affine
from gpu_worker.quantization.blocks import Block4Weight, Block8Weight
from gpu_worker.quantization.products import Weight as QuantizedWeight

KINDS = {torch.float32: WeightKind.FLOAT32, torch.bfloat16: WeightKind.BF16}


class KernelLinear:
    """x [rows, in_features], as it stands or quantized first → [rows, out_features]."""

    def __init__(self, library: Library, num_threads: int, weight: Weight, wanted: Output, input_dtype: torch.dtype,
                 output_dtype: torch.dtype) -> None:
        self.in_features, self.out_features, self.input_dtype = weight.k, weight.n, input_dtype
        self._weight, self._wanted = weight, wanted
        self._elementwise = Elementwise(library, num_threads)
        self._linear = Linear(library, weight, num_threads, output_dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x if self._wanted is Output.ROWS else self._elementwise.quantize(x, self._wanted))

    def structure(self) -> Product:
        """For a call that runs it among others; its addresses hold as long as this product lives."""
        return Product(self._weight.structure, self._wanted)


class KernelProducts:
    """Makes products for a number of threads."""

    def __init__(self, library: Library, num_threads: int) -> None:
        self._library, self._threads = library, num_threads

    def linear(self, affine: Affine) -> KernelLinear:
        dtype = affine.weight.dtype
        return self._made(Weight.from_float(KINDS[dtype], affine.weight, affine.bias), Output.ROWS, dtype, dtype)

    def head(self, weight: Tensor) -> KernelLinear:
        """→ float32 logits."""
        return self._made(Weight.from_float(KINDS[weight.dtype], weight), Output.ROWS, weight.dtype, torch.float32)

    def quantized(self, weight: QuantizedWeight, bias: Tensor | None, group: int | None) -> KernelLinear:
        """float32 rows, a scale each or (``group``) one for each 32 inputs → float32."""
        wanted = Output.PER_TOKEN if group is None else Output.PER_GROUP
        return self._made(_packed(weight, bias), wanted, torch.float32, torch.float32)

    def _made(self, weight: Weight, wanted: Output, input_dtype: torch.dtype, output_dtype: torch.dtype) -> KernelLinear:
        return KernelLinear(self._library, self._threads, weight, wanted, input_dtype, output_dtype)


def _packed(weight: QuantizedWeight, bias: Tensor | None) -> Weight:
    n, k = weight.shape
    scales = None
    if isinstance(weight, Block4Weight):
        kind, packed = WeightKind.INT4_BLOCKS, panels.pack_int4_blocks(weight.nibbles, weight.scales, weight.minimums)
    elif isinstance(weight, Block8Weight):
        kind, packed = WeightKind.INT8_BLOCKS, panels.pack_int8_blocks(weight.values, weight.scales)
    else:
        kind, packed, scales = WeightKind.INT8, panels.pack_int8(weight.values), panels.pad(weight.scales)
    return Weight(kind, n, k, k, packed, scales, None if bias is None else panels.pad(bias.float()))
