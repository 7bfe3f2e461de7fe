"""The arithmetic of ``linear.h`` in plain torch.

The oracle of the kernels' tests, and what quantized products run on where there are no kernels:
integer sums are exact (as float32 products of whole numbers that stay below 2^24), and all
other operations go element by element, so a row's bits do not depend on its neighbours.
Products of floats are summed one input after another, which is only good for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.kernels import panels as packing
from gpu_worker.kernels.elementwise import QuantizedRows
from gpu_worker.kernels.linear import InputKind, Weight, WeightKind, input_kind
from gpu_worker.kernels.panels import GROUP

EXACT_INPUTS = 1024          # 1,024 · 127 · 127 < 2^24


class LinearReference:
    """rows [any, k] → rows · weightᵀ + bias [any, n]; weights unpacked once."""

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        self.weight, self._dtype = weight, dtype
        self._unpacked = [each[:weight.n] for each in unpacked(weight)]

    def __call__(self, rows: Tensor | QuantizedRows) -> Tensor:
        weight = self.weight
        if isinstance(rows, Tensor):
            sums = _sum_floats(rows, self._unpacked[0], weight.k_block)
        elif input_kind(rows) == InputKind.PER_TOKEN:
            sums = exact_sums(rows.values, self._unpacked[0]).float() * rows.scales[:, None]
        else:
            sums = _sum_groups(rows, *self._unpacked)
        if weight.scales is not None:
            sums = sums * weight.scales[:weight.n]
        if weight.bias is not None:
            sums = sums + weight.bias[:weight.n]
        return sums.to(self._dtype)


def unpacked(weight: Weight) -> tuple[Tensor, ...]:
    """Values [n padded, k]; for blocks their scales, and minima where they have some, as float32 [n padded, k / 32]."""
    if weight.kind == WeightKind.INT8:
        return (packing.unpack_int8(weight.panels),)
    if weight.kind == WeightKind.INT8_BLOCKS:
        values, scales = packing.unpack_int8_blocks(weight.panels, weight.k)
        return values, scales.float()
    if weight.kind == WeightKind.INT4_BLOCKS:
        values, scales, minima = packing.unpack_int4_blocks(weight.panels, weight.k)
        return values, scales.float(), minima.float()
    return (packing.unpack_words(weight.panels, torch.bfloat16 if weight.kind == WeightKind.BF16 else torch.float32),)


def exact_sums(values: Tensor, weights: Tensor) -> Tensor:
    """int8 [rows, k] and [n, k] → int64 [rows, n]."""
    return sum(values[:, i:i + EXACT_INPUTS].float().mm(weights[:, i:i + EXACT_INPUTS].float().t()).long()
               for i in range(0, values.shape[1], EXACT_INPUTS))


def _sum_floats(rows: Tensor, weights: Tensor, k_block: int) -> Tensor:
    total = torch.zeros(len(rows), len(weights))
    for start in range(0, rows.shape[1], k_block):
        block = torch.zeros_like(total)
        for i in range(start, min(start + k_block, rows.shape[1])):
            block = fma(rows[:, i, None], weights[None, :, i], block)
        total = total + block if start else block
    return total


def _sum_groups(rows: QuantizedRows, weights: Tensor, scales: Tensor | None = None, minima: Tensor | None = None) -> Tensor:
    total = torch.zeros(len(rows.values), len(weights))
    for g in range(rows.scales.shape[1]):
        inputs = slice(g * GROUP, (g + 1) * GROUP)
        exact = rows.values[:, inputs].float().mm(weights[:, inputs].float().t())
        row_scales = rows.scales[:, g, None]
        if minima is not None:
            total = fma(minima[None, :, g], row_scales * rows.sums[:, g, None].float(), total)
        total = fma(row_scales if scales is None else scales[None, :, g] * row_scales, exact, total)
    return total


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c of float32 or bfloat16: the product is exact in float64. (Rounding twice, to float64 and then
    to float32, gives another result in about one of a billion.)"""
    return torch.addcmul(c.double(), a.double(), b.double()).float()
