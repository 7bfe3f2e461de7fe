"""Rows of activations as int8: what a quantized product takes.

Used by ``products.py``.  A scale belongs to a row, or to 32 inputs of a row, and never to a
batch; every step is a single IEEE operation, so a row has its bits wherever it stands.  The
kernels (``kernels/elementwise.py``) give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32               # inputs that share a scale, in groups and in blocks
LARGEST = 127            # of a quantized value: −128 is not used


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """values · scale, of the row or of the group."""

    values: Tensor       # int8 [rows, width], in [-127, 127]
    scales: Tensor       # float32 [rows, 1], or [rows, width // 32]


def quantized(x: Tensor, group: int | None) -> QuantizedRows:
    """x float32 [rows, width], each row (or ``group`` of its inputs) by its own largest number.

    What is not finite makes the scale so, and with it every product of the row.
    """
    rows, width = x.shape
    groups = x.view(rows, -1, group or width)
    largest = groups.abs().amax(-1)
    inverse = torch.where(largest > 0, LARGEST / largest, 0.0)
    values = (groups * inverse.unsqueeze(-1)).round_().nan_to_num_(0.0).clamp_(-LARGEST, LARGEST)
    return QuantizedRows(values.view(rows, width).to(torch.int8), largest / LARGEST)
