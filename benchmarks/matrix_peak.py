"""The yardstick of products: a large square ``torch.mm`` in the same run, on the same threads."""

from __future__ import annotations

import time

import torch

SIZE, ROUNDS = 2048, 5


def bf16_products() -> bool:
    """Whether oneDNN multiplies bfloat16 here; without it one product takes minutes."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peak_gflops(dtype: torch.dtype) -> float:
    """The best of a few rounds after one that warms."""
    a, b = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    torch.mm(a, b)
    best_s = min(_seconds(a, b) for _ in range(ROUNDS))
    return 2 * SIZE**3 / best_s / 1e9


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    started_s = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - started_s
