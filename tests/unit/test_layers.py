"""The products of the decoder: their numbers, in each dtype."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.models.layers import Linear, LMHead, packs

CPU = torch.device("cpu")
DIGITS = {torch.float32: 23, torch.bfloat16: 8, torch.float16: 11}       # bits behind a number's first one, and that one


def test_rows_are_promised_whether_or_not_the_cpu_multiplies_bfloat16() -> None:
    assert packs(torch.float32, CPU) and packs(torch.bfloat16, CPU) and not packs(torch.float16, CPU)


@pytest.mark.parametrize("dtype", DIGITS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_product_is_rounded_once(biased: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 96, generator=generator).to(dtype) for rows in (40, 8))
    bias = torch.randn(40, generator=generator).to(dtype) if biased else None
    exact = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    sums = 1e-4                                                           # of 96 products in float32
    found, head = Linear(weight, bias)(x), LMHead(weight, bias)(x)
    assert found.dtype == dtype and head.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= exact.abs() * 2.0 ** -DIGITS[dtype] + sums).all())
    assert bool(((head.double() - exact).abs() <= sums).all())
