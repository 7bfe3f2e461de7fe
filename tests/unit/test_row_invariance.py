"""A row has the same bits whatever stands beside it: each product of the default model, and attention.

Rows are heavy-tailed: on ordinary ones a wrong kernel shows once in thousands.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_worker.attention.interface import AttentionLayer
from gpu_worker.attention.reference import ReferenceAttention
from gpu_worker.models.layers import Linear, LMHead, packs
from gpu_worker.row_buckets import RowBuckets
from paged_requests import PagedRequests, random_request

CPU = torch.device("cpu")
NUM_ROWS = 128
ROW_COUNTS = (1, 2, 3, 5, 8, 33)
SHAPES = {       # out, in
    "qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "lm_head": (49152, 576),
    "a small model's qkv": (384, 128), "a small model's mlp": (512, 128)}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
LAYERS = {
    "default model": AttentionLayer(0, 9, 3, 64, 0.125),
    "heads alone": AttentionLayer(0, 4, 4, 32, 0.2),
    "window": AttentionLayer(0, 8, 2, 16, 0.25, window=100),
}


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(BITS[values.dtype])


def heavy_tailed(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 2.0 ** torch.randint(-8, 9, (rows, columns), generator=generator)


def product_of(name: str, dtype: torch.dtype) -> Linear | LMHead:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPES[name], generator=generator) * 0.05
    bias = torch.randn(SHAPES[name][0], generator=generator) if "small" in name else None
    return (LMHead if name == "lm_head" else Linear)(weight.to(dtype), None if bias is None else bias.to(dtype))


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_rows_of_a_product(name: str, dtype: torch.dtype) -> None:
    if not packs(dtype, CPU):
        pytest.skip(f"nothing is promised for {dtype} on this machine")
    product, buckets = product_of(name, dtype), RowBuckets()
    rows, others = (heavy_tailed(NUM_ROWS, SHAPES[name][1], seed).to(dtype) for seed in (1, 2))
    expected = bits(product(rows))
    assert len(expected.unique(dim=0)) == NUM_ROWS
    for count in ROW_COUNTS:
        for first in range(0, NUM_ROWS, count):
            some = rows[first:first + count]
            found = product(torch.cat((some, others[:buckets.bucket(len(some)) - len(some)])))[:len(some)]
            assert torch.equal(bits(found), expected[first:first + count]), f"rows {first} to {first + count} of {NUM_ROWS}"


def attended(layer: AttentionLayer, requests: list[Tensor], query_lens: list[int], order: list[int]) -> dict[int, Tensor]:
    """The last tokens of the requests in ``order``, in one step; all tokens before them were there."""
    batch = PagedRequests(ReferenceAttention(), layer, requests, seed=len(order))
    for request in order:
        if len(requests[request]) > query_lens[request]:
            batch.step([(request, 0, len(requests[request]) - query_lens[request])])
    outputs = batch.step([(request, len(requests[request]) - query_lens[request], query_lens[request]) for request in order])
    return dict(zip(order, outputs, strict=True))


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("query_len", [1, 16, 512])
@pytest.mark.parametrize("name", LAYERS)
@torch.inference_mode()
def test_rows_of_attention(name: str, query_len: int, dtype: torch.dtype) -> None:
    """Neighbours see up to six tiles more, or fewer, than the row does; before and behind it."""
    layer, computed = LAYERS[name], 235
    request = random_request(layer, computed + query_len, dtype, 1, heavy_tailed=True)
    expected = bits(attended(layer, [request], [query_len], [0])[0])
    for tiles in range(7):
        longer = random_request(layer, computed + query_len + 32 * tiles, dtype, 2, heavy_tailed=True)
        shorter = random_request(layer, computed + 1 - 32 * tiles, dtype, 3, heavy_tailed=True)
        for order in ([0, 1], [2, 1, 0]):
            found = attended(layer, [request, longer, shorter], [query_len, query_len, 1], order)[0]
            assert torch.equal(bits(found), expected), f"{tiles} tiles, order {order}"
