"""Quantizers and the products in plain torch: how near, how exact, and the same bits for a row wherever it stands."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_worker.quantization.blocks import Block4Weight, Block8Weight
from gpu_worker.quantization.channels import ChannelWeight
from gpu_worker.quantization.products import QuantizedLinear
from gpu_worker.quantization.rows import GROUP, quantized

KINDS = {"channels by token": (ChannelWeight, None), "channels in groups": (ChannelWeight, GROUP),
         "8-bit blocks": (Block8Weight, GROUP), "4-bit blocks": (Block4Weight, GROUP)}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed) * 2.0 ** torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed + 1))


def linear(kind: str, weight: Tensor, bias: Tensor | None = None) -> QuantizedLinear:
    weights, group = KINDS[kind]
    return QuantizedLinear(weights.from_float(weight), bias, group=group)


def dequantized_rows(x: Tensor, group: int | None) -> Tensor:
    """float64, what a product computes with."""
    rows = quantized(x, group)
    return (rows.values.view(len(x), rows.scales.shape[1], -1).double() * rows.scales.double().unsqueeze(-1)).view(x.shape)


@pytest.mark.parametrize("group", [None, GROUP])
def test_rows_become_the_nearest_values(group: int | None) -> None:
    x = heavy_tailed(5, 96)
    rows = quantized(x, group)
    assert rows.values.dtype == torch.int8 and rows.scales.shape == (5, 1 if group is None else 3)
    assert (rows.values.view(*rows.scales.shape, -1).abs().amax(-1) == 127).all()
    steps = rows.scales.repeat_interleave(96 // rows.scales.shape[1], 1)
    assert ((dequantized_rows(x, group) - x).abs() <= 0.50001 * steps).all()


def test_a_row_of_zeros_stays_one() -> None:
    rows = quantized(torch.zeros(2, 64), GROUP)
    assert not rows.values.any() and not rows.scales.any()


@EVERY_KIND
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_of_what_the_weights_say(kind: str, with_bias: bool) -> None:
    bias = normal(70, seed=2) if with_bias else None
    product, x = linear(kind, normal(70, 96), bias), normal(9, 96, seed=1)
    expected = dequantized_rows(x, KINDS[kind][1]) @ product.weight.dequantized().double().t()
    if bias is not None:
        expected += bias
    assert (product.out_features, product.in_features, product.input_dtype) == (70, 96, torch.float32)
    assert torch.allclose(product(x).double(), expected, rtol=1e-5, atol=1e-5)


@EVERY_KIND
def test_sums_are_exact_however_long(kind: str) -> None:
    """All inputs at their ends: 4,160 products of 127 · 127 do not fit into a float32."""
    width = 4160
    sign = torch.where(normal(3, width) < -2, -1.0, 1.0)
    x = 127.0 * sign[:2]
    weight = 127.0 * sign[2:].repeat(4, 1)
    weight[3, ::3] = 0.0                         # in 4 bits: blocks of 0 and ±127
    product = linear(kind, weight)
    exact = x.double() @ product.weight.dequantized().double().t()
    found = product(x)
    if kind == "channels by token":
        assert torch.equal(found, exact.float())
    assert torch.allclose(found.double(), exact, rtol=1e-6)


@EVERY_KIND
def test_a_row_has_its_bits_wherever_it_stands(kind: str) -> None:
    product, x = linear(kind, normal(300, 160), normal(300, seed=4)), heavy_tailed(150, 160, seed=3)
    x[20::7] = float("nan")
    everything = product(x)
    for rows in ([0], [1, 0], [5, 6, 7], list(range(149, -1, -1)), list(range(3, 70))):
        assert torch.equal(product(x[rows]).view(torch.int32), everything[rows].view(torch.int32))


@EVERY_KIND
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails_its_own_row(kind: str, bad: float) -> None:
    product, x = linear(kind, normal(40, 64)), normal(3, 64)
    clean = product(x)
    x[1, 17] = bad
    found = product(x)
    assert not torch.isfinite(found[1]).any()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_errors_of_the_formats() -> None:
    """Relative squared errors on normal numbers: as large as the bits allow, no larger."""
    weight = normal(64, 512)
    errors = {}
    for kind in (ChannelWeight, Block8Weight, Block4Weight):
        errors[kind] = float((kind.from_float(weight).dequantized() - weight).square().mean())
    assert errors[ChannelWeight] < 8e-5 and errors[Block8Weight] < 3e-5 and errors[Block4Weight] < 5.6e-3


def test_four_bits_are_searched_for_better_than_the_file_format_does() -> None:
    weight = normal(64, 512, seed=5)
    plain = gguf.dequantize(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1), gguf.GGMLQuantizationType.Q4_1)
    errors = [float((found - weight).square().mean()) for found in (Block4Weight.from_float(weight).dequantized(), torch.from_numpy(plain))]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("block", [[0.0] * 32, [3.0] * 32, [-5.0] * 32, [0.0] * 31 + [1.0], [-1.0] + [0.0] * 31, [-7.0, 8.0] * 16])
def test_blocks_of_few_different_numbers(block: list[float]) -> None:
    weight = torch.tensor([block])
    assert torch.allclose(Block4Weight.from_float(weight).dequantized(), weight, rtol=1e-3, atol=1e-3)
    half_a_step = float(weight.abs().max()) / 127 * 0.51
    assert torch.allclose(Block8Weight.from_float(weight).dequantized(), weight, rtol=0, atol=half_a_step)
    assert torch.allclose(ChannelWeight.from_float(weight).dequantized(), weight, rtol=0, atol=half_a_step)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_of_a_file_are_taken_as_they_are(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    data = gguf.quantize(heavy_tailed(10, 96).numpy(), kind)
    weight = Block8Weight.from_gguf(data) if name == "Q8_0" else Block4Weight.from_gguf(name, data)
    assert weight.shape == (10, 96)
    assert np.array_equal(weight.dequantized().numpy(), gguf.dequantize(data, kind))
