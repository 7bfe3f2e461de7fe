"""Weights in panels of 16 outputs, as ``linear.h`` describes them, and back.

Used by ``linear.py``.  Plain torch: packing is one transposition of 32-bit words, so a model of
135 million weights takes about a second.  n is padded to whole panels, k is a multiple of 32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUT = "panels1"           # of what is packed here: another name with every change of the order
PANEL = 16                   # outputs
GROUP = 32                   # inputs that share a scale
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}       # of a GGUF file, for 32 inputs


def pad(outputs: Tensor) -> Tensor:
    """[n, …] → whole panels, zeros behind."""
    missing = -outputs.shape[0] % PANEL
    return F.pad(outputs, (0, 0) * (outputs.dim() - 1) + (0, missing)) if missing else outputs


def pack_words(weight: Tensor) -> Tensor:
    """[n, k] of any type → uint8 [panels, bytes]: the 16 outputs' first 32 bits, their second, …"""
    words = pad(weight.contiguous().view(torch.int32))
    panels = words.view(-1, PANEL, words.shape[1]).transpose(1, 2).contiguous()
    return panels.view(len(panels), -1).view(torch.uint8)


def unpack_words(panels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [panels, bytes] → [n padded, k]."""
    words = panels.contiguous().view(torch.int32).view(len(panels), -1, PANEL)
    return words.transpose(1, 2).contiguous().view(len(panels) * PANEL, -1).view(dtype)


def pack_int8(values: Tensor) -> Tensor:
    """int8 [n, k] → panels of each value + 128."""
    return pack_words(values.view(torch.uint8) ^ 0x80)


def unpack_int8(panels: Tensor) -> Tensor:
    return (unpack_words(panels, torch.uint8) ^ 0x80).view(torch.int8)


def pack_int8_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """int8 [n, k] and float16 [n, k / 32] → panels of, per 64 inputs, both groups' scales and then their values."""
    num_groups = scales.shape[1]
    weights = pack_int8(values).view(-1, num_groups, PANEL * GROUP)
    scales = _by_panel(scales).view(torch.uint8)                                      # [panels, groups, 32]
    if num_groups % 2:
        weights, scales = F.pad(weights, (0, 0, 0, 1)), F.pad(scales, (0, 0, 0, 1))
    pairs = torch.cat((scales.reshape(len(scales), -1, 4 * PANEL), weights.view(len(weights), -1, 2 * PANEL * GROUP)), 2)
    return pairs.view(len(pairs), -1)[:, :int8_block_bytes(num_groups)].contiguous()


def unpack_int8_blocks(panels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """int8 [n padded, k] and float16 [n padded, k / 32]."""
    num_groups, pair_bytes = k // GROUP, 4 * PANEL + 2 * PANEL * GROUP
    pairs = F.pad(panels, (0, -panels.shape[1] % pair_bytes)).view(len(panels), -1, pair_bytes)
    scales = pairs[:, :, :4 * PANEL].contiguous().view(torch.float16).view(len(panels), -1, PANEL)[:, :num_groups]
    weights = pairs[:, :, 4 * PANEL:].reshape(len(panels), -1)[:, :PANEL * k]
    return unpack_int8(weights), _by_output(scales)


def pack_int4_blocks(halves: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """uint8 [n, k / 32, 16], input i in the lower half of byte i and input 16 + i in the upper, and float16 [n, k / 32]."""
    num_groups = scales.shape[1]
    weights = pack_words(halves.reshape(len(halves), -1)).view(-1, num_groups, PANEL * GROUP // 2)
    numbers = [_by_panel(each).view(torch.uint8) for each in (scales, minima)]
    return torch.cat((weights, *numbers), 2).view(len(weights), -1)


def unpack_int4_blocks(panels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [n padded, k] in 0 … 15 and float16 [n padded, k / 32] twice: scales, minima."""
    blocks = panels.view(len(panels), k // GROUP, -1)
    weights, scales, minima = blocks.split((PANEL * GROUP // 2, 2 * PANEL, 2 * PANEL), 2)
    halves = unpack_words(weights.reshape(len(panels), -1), torch.uint8).view(-1, k // GROUP, GROUP // 2)
    values = torch.cat((halves & 15, halves >> 4), 2).view(-1, k)
    return values, *(_by_output(each.contiguous().view(torch.float16)) for each in (scales, minima))


def int8_block_bytes(num_groups: int) -> int:
    """Of a panel."""
    return num_groups * PANEL * GROUP + (num_groups + 1) // 2 * 4 * PANEL


def int4_block_bytes(num_groups: int) -> int:
    """Of a panel."""
    return num_groups * (PANEL * GROUP // 2 + 4 * PANEL)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, k] → int8, to the nearest, and float32 scales [n]."""
    scales = weight.abs().amax(1) / 127
    return torch.round(weight / _divisor(scales)[:, None]).to(torch.int8), scales


def quantize_int8_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, k] → int8, and float16 scales [n, k / 32]."""
    groups = weight.view(len(weight), -1, GROUP)
    scales = _float16(groups.abs().amax(2) / 127)
    values = torch.round(groups / _divisor(scales.float())[:, :, None]).clamp_(-127, 127)
    return values.to(torch.int8).view(weight.shape), scales


def quantize_int4_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [n, k] → halves, scales and minima, as ``pack_int4_blocks`` takes them."""
    groups = weight.view(len(weight), -1, GROUP)
    least, most = groups.aminmax(dim=2)
    minima, scales = _float16(least), _float16((most - least) / 15)
    values = (groups - minima.float()[:, :, None]) / _divisor(scales.float())[:, :, None]
    values = torch.round(values).clamp_(0, 15).to(torch.uint8)
    return values[:, :, :GROUP // 2] | (values[:, :, GROUP // 2:] << 4), scales, minima


def read_gguf_int8(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q8_0, uint8 [n, k / 32 · 34] → int8 [n, k] and float16 scales."""
    blocks = blocks.view(len(blocks), -1, BLOCK_BYTES["Q8_0"])
    return blocks[:, :, 2:].reshape(len(blocks), -1).view(torch.int8), _number(blocks, 0)


def read_gguf_int4(blocks: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Q4_1 or Q4_0 (whose minimum is −8 scales) → halves, scales and minima."""
    blocks = blocks.view(len(blocks), -1, BLOCK_BYTES[name])
    scales = _number(blocks, 0)
    minima = _number(blocks, 2) if name == "Q4_1" else _float16(scales.float() * -8)
    return blocks[:, :, -GROUP // 2:].contiguous(), scales, minima


def _number(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, :, at:at + 2].contiguous().view(torch.float16)[:, :, 0]


def _by_panel(numbers: Tensor) -> Tensor:
    """[n, groups] → [panels, groups, 16]."""
    return pad(numbers).view(-1, PANEL, numbers.shape[1]).transpose(1, 2).contiguous()


def _by_output(numbers: Tensor) -> Tensor:
    """[panels, groups, 16] → [n padded, groups]."""
    return numbers.transpose(1, 2).reshape(-1, numbers.shape[1])


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, 1)


def _float16(numbers: Tensor) -> Tensor:
    rounded = numbers.half()
    if not torch.isfinite(rounded).all():
        raise ValueError("a block's scale or minimum does not fit into float16")
    return rounded
