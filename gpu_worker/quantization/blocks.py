"""Weights in blocks of 32 inputs, each with a scale of its own: the formats of GGUF files.

4 bits: Q4_0 and Q4_1 blocks as a file has them, or made here; 8 bits: Q8_0, for the head.
Made by ``int4_model.py``; multiplied by ``products.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gpu_worker.quantization.rows import GROUP, LARGEST

STEPS = 15                                                       # between the least and the largest 4-bit value
NARROWED = (1.0, 0.94, 0.88)                                     # ranges tried for a block, as parts of its own
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
SEARCHED_BLOCKS = 1 << 14                                        # at a time: they should stay in the cache


@dataclass(frozen=True, slots=True)
class Block4Weight:
    """scale · value + minimum, values 0 … 15."""

    INTEGERS: ClassVar[tuple[int, int]] = (-8, 7)        # with scale 1 and minimum −8

    nibbles: Tensor      # uint8 [out, in // 32, 16]: byte j holds input j below, input 16 + j above
    scales: Tensor       # float16 [out, in // 32]
    minimums: Tensor     # float16 [out, in // 32]

    @classmethod
    def from_float(cls, weight: Tensor) -> Block4Weight:
        """weight float32 [out, in]: the best of a few ranges for each block, by squared error."""
        blocks = weight.reshape(-1, GROUP)
        parts = [_searched(part) for part in blocks.split(SEARCHED_BLOCKS)]
        values, scales, minimums = (torch.cat(found) for found in zip(*parts, strict=True))
        shape = (weight.shape[0], weight.shape[1] // GROUP)
        return cls(_packed(values).view(*shape, GROUP // 2), scales.view(shape), minimums.view(shape))

    @classmethod
    def from_gguf(cls, kind: str, data: np.ndarray) -> Block4Weight:
        """data uint8 [out, bytes of a row], blocks of ``kind`` Q4_0 or Q4_1: the same numbers, exactly."""
        blocks = torch.from_numpy(data).view(data.shape[0], -1, BLOCK_BYTES[kind])
        scales = _halves(blocks, 0)
        minimums = _halves(blocks, 1) if kind == "Q4_1" else scales * -8.0       # Q4_0: d · (value − 8)
        return cls(blocks[..., -GROUP // 2:].contiguous(), scales, minimums)

    @classmethod
    def from_integers(cls, values: Tensor) -> Block4Weight:
        """int64 [out, in] within ``INTEGERS``."""
        least = cls.INTEGERS[0]
        ones = torch.ones(len(values), values.shape[1] // GROUP, dtype=torch.float16)
        return cls(_packed((values - least).view(-1, GROUP)).view(len(values), -1, GROUP // 2), ones, ones * least)

    def values(self, outputs: slice = slice(None)) -> Tensor:
        """uint8 [out, in // 32, 32]."""
        nibbles = self.nibbles[outputs]
        return torch.cat((nibbles & 15, nibbles >> 4), dim=-1)

    def dequantized(self) -> Tensor:
        """float32 [out, in]."""
        found = self.values() * self.scales.float().unsqueeze(-1) + self.minimums.float().unsqueeze(-1)
        return found.view(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[0], self.scales.shape[1] * GROUP


@dataclass(frozen=True, slots=True)
class Block8Weight:
    """scale · value."""

    INTEGERS: ClassVar[tuple[int, int]] = (-128, LARGEST)

    values: Tensor       # int8 [out, in], in [-127, 127]
    scales: Tensor       # float16 [out, in // 32]

    @classmethod
    def from_float(cls, weight: Tensor) -> Block8Weight:
        """weight float32 [out, in], each block by its own largest weight, to the nearest."""
        blocks = weight.view(weight.shape[0], -1, GROUP)
        scales = (blocks.abs().amax(-1) / LARGEST).half()
        inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
        values = (blocks * inverse.unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
        return cls(values.view(weight.shape).to(torch.int8), scales)

    @classmethod
    def from_gguf(cls, data: np.ndarray) -> Block8Weight:
        """data uint8 [out, bytes of a row], blocks of Q8_0: the same numbers, exactly."""
        blocks = torch.from_numpy(data).view(data.shape[0], -1, BLOCK_BYTES["Q8_0"])
        return cls(blocks[..., 2:].contiguous().view(torch.int8).view(data.shape[0], -1), _halves(blocks, 0))

    @classmethod
    def from_integers(cls, values: Tensor) -> Block8Weight:
        """int64 [out, in] within ``INTEGERS``, all scales 1."""
        return cls(values.to(torch.int8), torch.ones(len(values), values.shape[1] // GROUP, dtype=torch.float16))

    def dequantized(self) -> Tensor:
        """float32 [out, in]."""
        blocks = self.values.view(*self.scales.shape, GROUP) * self.scales.float().unsqueeze(-1)
        return blocks.view(self.values.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)


def _halves(blocks: Tensor, place: int) -> Tensor:
    """The float16 number at ``place`` of each block's bytes."""
    return blocks[..., 2 * place:2 * place + 2].contiguous().view(torch.float16).squeeze(-1)


def _packed(values: Tensor) -> Tensor:
    """[n, 32] in 0 … 15 → uint8 [n, 16]."""
    low, high = values.to(torch.uint8).split(GROUP // 2, dim=1)
    return low | high << 4


def _searched(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """blocks float32 [n, 32] → values [n, 32], scales and minimums float16 [n] of the least squared error."""
    least, largest = blocks.aminmax(dim=1, keepdim=True)
    best_error = torch.full_like(least, float("inf"))
    best = [torch.zeros_like(blocks), torch.zeros_like(least), torch.zeros_like(least)]
    middle, half_range = (least + largest) / 2, (largest - least) / 2
    for part in NARROWED:
        scale, minimum = _rounded_to_half(half_range * (2 * part / STEPS)), _rounded_to_half(middle - half_range * part)
        scale, minimum = _fitted(blocks, _nearest(blocks, scale, minimum), scale, minimum)
        values = _nearest(blocks, scale, minimum)
        error = (values * scale + minimum - blocks).square_().sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = [torch.where(better, new, old) for new, old in zip((values, scale, minimum), best, strict=True)]
    return best[0], best[1].half().squeeze(1), best[2].half().squeeze(1)


def _nearest(blocks: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((blocks - minimum) * inverse).round_().clamp_(0, STEPS)


def _fitted(blocks: Tensor, values: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the minimum of the least squared error for given values; as given where there is none."""
    mean_value, mean_weight = values.mean(1, keepdim=True), blocks.mean(1, keepdim=True)
    apart = values - mean_value
    spread = apart.square().sum(1, keepdim=True)
    fitted = (apart * blocks).sum(1, keepdim=True) / spread
    found = (spread > 0) & (fitted > 0)
    fitted = torch.where(found, _rounded_to_half(fitted), scale)
    return fitted, torch.where(found, _rounded_to_half(mean_weight - fitted * mean_value), minimum)


def _rounded_to_half(x: Tensor) -> Tensor:
    """To what the file format can hold."""
    return x.half().float()
