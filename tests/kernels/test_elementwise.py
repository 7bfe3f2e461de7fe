"""Norm, activation and quantization against plain torch, and their bits against themselves."""

import pytest
import torch

from gpu_worker.kernels.elementwise import Elementwise, Output, QuantizedRows

WIDTH = 576
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def kernels(library, request):
    return Elementwise(library, request.param)


def rows(count, width=WIDTH, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = 2.0 ** torch.randint(-8, 9, (count, width), generator=generator)
    return (torch.randn(count, width, generator=generator) * spread).to(dtype)


def rms_norm(hidden, weight, eps):
    x = hidden.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def dequantized(found: QuantizedRows):
    rows, width = found.values.shape
    scales = found.scales.reshape(rows, -1)
    return found.values.double() * scales.repeat_interleave(width // scales.shape[1], 1).double()


def same(one: QuantizedRows, other: QuantizedRows):
    return torch.equal(one.values, other.values) and torch.equal(one.scales, other.scales) and torch.equal(one.sums, other.sums)


def tolerance(dtype):
    return {torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]


@DTYPES
@pytest.mark.parametrize("with_added", [False, True])
def test_norm(kernels, dtype, with_added):
    hidden, weight = rows(7, dtype=dtype), rows(1, dtype=dtype, seed=2)[0]
    added = rows(7, dtype=dtype, seed=1) if with_added else None
    expected_hidden = hidden if added is None else (hidden.float() + added.float()).to(dtype)
    normed = kernels.add_norm(hidden, added, weight, 1e-5)
    assert torch.equal(hidden, expected_hidden)
    expected = rms_norm(hidden, weight, 1e-5)
    assert ((normed.double() - expected).abs() <= tolerance(dtype) * expected.abs() + 1e-30).all()


@DTYPES
def test_activation(kernels, dtype):
    gate_up = rows(5, 2 * WIDTH, dtype)
    gate, up = gate_up.double().chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    found = kernels.silu_multiply(gate_up).double()
    assert ((found - expected).abs() <= tolerance(dtype) * expected.abs() + 1e-30).all()


@DTYPES
@pytest.mark.parametrize("output", [Output.PER_TOKEN, Output.PER_GROUP], ids=str)
def test_quantized_to_the_nearest(kernels, dtype, output):
    x = rows(6, dtype=dtype)
    found = kernels.quantize(x, output)
    steps = found.scales.reshape(6, -1).double().repeat_interleave(WIDTH // found.scales.reshape(6, -1).shape[1], 1)
    assert found.values.abs().max() == 127
    assert torch.equal(found.sums, found.values.reshape(*found.sums.shape, -1).sum(-1, dtype=torch.int32))
    assert ((dequantized(found) - x.double()).abs() <= steps * 0.50001).all()
    assert torch.equal(kernels.add_norm(x.clone(), None, torch.ones(WIDTH, dtype=dtype), 1e-5, output).values.abs().amax(1),
                       torch.full((6,), 127, dtype=torch.int8))


@pytest.mark.parametrize("output", [Output.PER_TOKEN, Output.PER_GROUP], ids=str)
def test_fused_is_equal_to_one_after_another(kernels, output):
    gate_up = rows(5, 2 * WIDTH)
    fused, apart = kernels.silu_multiply(gate_up, output), kernels.quantize(kernels.silu_multiply(gate_up), output)
    assert same(fused, apart)
    hidden, weight = rows(5, seed=3), rows(1, seed=4)[0]
    fused = kernels.add_norm(hidden, None, weight, 1e-5, output)
    apart = kernels.quantize(kernels.add_norm(hidden, None, weight, 1e-5), output)
    assert same(fused, apart)


def test_a_row_of_zeros_stays_one(kernels):
    found = kernels.quantize(torch.zeros(2, WIDTH), Output.PER_TOKEN)
    assert not found.values.any() and not found.scales.any()


@pytest.mark.parametrize("top", [1e-37, 1e-40])
def test_what_is_too_small_for_a_scale_becomes_zero(kernels, top):
    x = rows(2) * (top / 1e4)
    for output in (Output.PER_TOKEN, Output.PER_GROUP):
        found = kernels.quantize(x, output)
        assert not found.values.any() and not found.sums.any() and torch.isfinite(found.scales).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_makes_its_own_row_so(kernels, bad):
    x = rows(3)
    clean = kernels.quantize(x, Output.PER_TOKEN)
    x[1, 77] = bad
    found = kernels.quantize(x, Output.PER_TOKEN)
    assert not torch.isfinite(found.scales[1])
    for row in (0, 2):
        assert torch.equal(found.values[row], clean.values[row]) and found.scales[row] == clean.scales[row]
    assert torch.isnan(kernels.add_norm(x, None, torch.ones(WIDTH), 1e-5)[1]).any()


@DTYPES
def test_a_row_has_its_bits_wherever_it_stands(kernels, dtype):
    x, weight = rows(33, 2 * WIDTH, dtype), rows(1, 2 * WIDTH, dtype, seed=5)[0]
    all_normed, all_activated = kernels.add_norm(x.clone(), None, weight, 1e-5), kernels.silu_multiply(x)
    for count in (1, 2, 5):
        part = x[33 - count:].clone()
        assert torch.equal(kernels.add_norm(part.clone(), None, weight, 1e-5), all_normed[33 - count:])
        assert torch.equal(kernels.silu_multiply(part), all_activated[33 - count:])
