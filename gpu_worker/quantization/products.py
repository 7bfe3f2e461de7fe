"""Products of int8 rows with quantized weights, in plain torch: what they are, and what to do without kernels.

Given to the decoder by ``parts.py``; the oracle of the kernels.  Sums over inputs are exact
integers (a float32 matrix product of whole numbers is, below 2²⁴), and everything after them is
one IEEE operation an element in the order written here; so a row has its bits whatever stands
beside it.  With s the scale of a row or of its group, (·) one float32 rounding:

- channels, rows by token: ((exact sum over all inputs · s) · scale of the output)
- channels, rows in groups: y = fma(s, exact sum of the group, y), groups ascending; then (y · scale of the output)
- 8-bit blocks: y = fma((scale · s), exact sum of the group, y), groups ascending
- 4-bit blocks: y = fma(minimum, (s · sum of the group's inputs), y), then
  y = fma((scale · s), exact sum of values · inputs, y); groups ascending

and last (y + bias).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.models.spec import kind_of
from gpu_worker.quantization.blocks import Block4Weight, Block8Weight
from gpu_worker.quantization.channels import ChannelWeight
from gpu_worker.quantization.rows import GROUP, QuantizedRows, quantized

Weight = ChannelWeight | Block4Weight | Block8Weight
SUMMED_INPUTS = 1024        # at most 1,040 products of 127 · 127 stay below 2²⁴
SLICE_ROWS = 64
SLICE_SUMS = 1 << 21        # exact sums held at once: they should stay in the last-level cache


class QuantizedLinear:
    """x float32 [rows, in] → x · weightᵀ + bias, float32 [rows, out]; x becomes int8 on the way."""

    __slots__ = ("out_features", "in_features", "input_dtype", "kind", "integers", "weight", "bias", "group")

    def __init__(self, weight: Weight, bias: Tensor | None = None, group: int | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.input_dtype = torch.float32
        self.kind = kind_of(f"{type(weight).__name__}, a scale for {group or 'all'} inputs of a row", bias)
        self.integers = weight.INTEGERS
        self.weight, self.bias, self.group = weight, bias, group

    def of_integers(self, values: Tensor) -> QuantizedLinear:
        return QuantizedLinear(self.weight.from_integers(values), None, self.group)

    def __call__(self, x: Tensor) -> Tensor:
        result = torch.empty(x.shape[0], self.out_features)
        for first in range(0, x.shape[0], SLICE_ROWS):
            rows = quantized(x[first:first + SLICE_ROWS], self.group)
            for outputs in self._slices(len(rows.values)):
                result[first:first + SLICE_ROWS, outputs] = self._product(rows, outputs)
        return result if self.bias is None else result.add_(self.bias)

    def _slices(self, num_rows: int) -> list[slice]:
        """Outputs to compute at a time."""
        sums = num_rows * (1 if self.group is None else self.in_features // GROUP)
        size = max(1, SLICE_SUMS // sums)
        return [slice(first, first + size) for first in range(0, self.out_features, size)]

    def _product(self, rows: QuantizedRows, outputs: slice) -> Tensor:
        weight = self.weight
        if isinstance(weight, Block4Weight):
            return _block4_product(rows, weight.values(outputs), weight.scales[outputs].float(), weight.minimums[outputs].float())
        if isinstance(weight, Block8Weight):
            return _block8_product(rows, weight.values[outputs], weight.scales[outputs].float())
        if self.group is None:
            return _token_product(rows, weight.values[outputs], weight.scales[outputs])
        return _group_product(rows, weight.values[outputs], weight.scales[outputs])


def _token_product(rows: QuantizedRows, values: Tensor, scales: Tensor) -> Tensor:
    sums = 0
    for first in range(0, values.shape[1], SUMMED_INPUTS):
        part = slice(first, first + SUMMED_INPUTS)
        sums = sums + (rows.values[:, part].float() @ values[:, part].float().t()).double()
    return sums.float().mul_(rows.scales).mul_(scales)


def _group_product(rows: QuantizedRows, values: Tensor, scales: Tensor) -> Tensor:
    y = torch.zeros(len(rows.values), len(values))
    for group, sums in enumerate(_group_sums(rows, values.view(len(values), -1, GROUP))):
        y = _fma(rows.scales[:, group, None], sums, y)
    return y.mul_(scales)


def _block8_product(rows: QuantizedRows, values: Tensor, scales: Tensor) -> Tensor:
    y = torch.zeros(len(rows.values), len(values))
    for group, sums in enumerate(_group_sums(rows, values.view(len(values), -1, GROUP))):
        y = _fma(rows.scales[:, group, None] * scales[:, group], sums, y)
    return y


def _block4_product(rows: QuantizedRows, values: Tensor, scales: Tensor, minimums: Tensor) -> Tensor:
    y = torch.zeros(len(rows.values), len(values))
    inputs = rows.values.view(len(rows.values), -1, GROUP).sum(-1).float().mul_(rows.scales)       # [rows, groups]
    for group, sums in enumerate(_group_sums(rows, values)):
        y = _fma(minimums[:, group], inputs[:, group, None], y)
        y = _fma(rows.scales[:, group, None] * scales[:, group], sums, y)
    return y


def _group_sums(rows: QuantizedRows, values: Tensor) -> Tensor:
    """values [out, groups, 32] → exact sums as float32 [groups, rows, out]."""
    inputs = rows.values.view(len(rows.values), -1, GROUP)
    return torch.bmm(inputs.transpose(0, 1).float(), values.permute(1, 2, 0).float())


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c, float32, as one operation: the product is exact in float64."""
    return (a.double() * b.double()).add_(c).float()
