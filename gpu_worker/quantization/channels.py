"""int8 weights with one scale for each output channel.

Made by ``int8_model.py``; multiplied by ``products.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gpu_worker.quantization.rows import LARGEST


@dataclass(frozen=True, slots=True)
class ChannelWeight:
    """values · scale of the output."""

    INTEGERS: ClassVar[tuple[int, int]] = (-LARGEST, LARGEST)

    values: Tensor       # int8 [out, in], in [-127, 127]
    scales: Tensor       # float32 [out]

    @classmethod
    def from_float(cls, weight: Tensor) -> ChannelWeight:
        """weight float32 [out, in], each output by its own largest weight, to the nearest."""
        scales = weight.abs().amax(1) / LARGEST
        inverse = torch.where(scales > 0, 1 / scales, 0.0)
        values = (weight * inverse.unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST)
        return cls(values.to(torch.int8), scales)

    @classmethod
    def from_integers(cls, values: Tensor) -> ChannelWeight:
        """int64 [out, in], all scales 1."""
        return cls(values.to(torch.int8), torch.ones(len(values)))

    def dequantized(self) -> Tensor:
        """float32 [out, in]."""
        return self.values * self.scales.unsqueeze(1)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)
