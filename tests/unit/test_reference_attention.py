"""The reference attention against a softmax written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_worker.attention.interface import AttentionLayer
from gpu_worker.attention.reference import ReferenceAttention
from paged_requests import PagedRequests, parts, random_request

LENGTHS = [1, 31, 32, 33, 64, 100, 256, 257, 300, 530]     # tokens
ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}   # difference; values have a standard deviation of 1
LAYERS = {
    "heads alone": AttentionLayer(0, 4, 4, 16, 0.25),
    "grouped": AttentionLayer(0, 9, 3, 64, 0.125),
    "one key head": AttentionLayer(0, 8, 1, 8, 0.5),
    "odd size": AttentionLayer(0, 6, 2, 20, 0.3),
    "window 1": AttentionLayer(0, 4, 2, 16, 0.25, window=1),
    "window 21": AttentionLayer(0, 4, 2, 16, 0.25, window=21),
    "window 32": AttentionLayer(0, 4, 2, 16, 0.25, window=32),
    "window 33": AttentionLayer(0, 4, 2, 16, 0.25, window=33),
    "window 290": AttentionLayer(0, 4, 2, 16, 0.25, window=290),
    "softcap": AttentionLayer(0, 4, 2, 16, 0.5, softcap=2.0),
    "softcap and window": AttentionLayer(0, 4, 2, 16, 0.5, window=40, softcap=20.0),
}


def naive(layer: AttentionLayer, tokens: Tensor) -> Tensor:
    """float64 [num_tokens, num_heads * head_dim]."""
    query, key, value = (part.double() for part in parts(layer, tokens))
    group = layer.num_heads // layer.num_kv_heads
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    behind = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))      # [query, key]
    seen = (behind >= 0) & (behind < (layer.window or len(tokens)))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).reshape(len(tokens), -1)


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert float((found.double() - expected).abs().max()) <= ALLOWED[dtype]


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_whole_prompts_together(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]
    requests = [random_request(layer, length, dtype, seed) for seed, length in enumerate(LENGTHS)]
    found = PagedRequests(ReferenceAttention(), layer, requests).step([(i, 0, length) for i, length in enumerate(LENGTHS)])
    check(torch.cat(found), torch.cat([naive(layer, tokens) for tokens in requests]), dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_chunks_and_single_tokens_together(name: str) -> None:
    """Every step takes a random piece of each request that has some left."""
    layer, generator = LAYERS[name], np.random.default_rng(3)
    requests = [random_request(layer, length, torch.float32, seed) for seed, length in enumerate(LENGTHS)]
    batch = PagedRequests(ReferenceAttention(), layer, requests)
    computed, found = [0] * len(LENGTHS), [[] for _ in LENGTHS]
    while rows := [(i, done, min(length - done, int(generator.choice([1, 1, 2, 15, 16, 17, 70]))))
                   for i, (done, length) in enumerate(zip(computed, LENGTHS, strict=True)) if done < length]:
        for (i, _done, new), output in zip(rows, batch.step(rows), strict=True):
            found[i].append(output)
            computed[i] += new
    check(torch.cat([output for outputs in found for output in outputs]), torch.cat([naive(layer, tokens) for tokens in requests]), torch.float32)


@pytest.mark.parametrize("name", ["grouped", "window 21", "softcap"])
def test_blocks_that_another_request_has_left(name: str) -> None:
    """Stale keys and values of any size stand behind what the request has written."""
    layer = LAYERS[name]
    tokens = random_request(layer, 300, torch.float32, 1)
    batch = PagedRequests(ReferenceAttention(), layer, [tokens])
    for stale in (float("nan"), float("inf"), 3e38):
        for tensor in batch.kv.layers[0].tensors():
            tensor.fill_(stale)
        check(batch.in_chunks(0, [100, 1, 1, 33, 165]), naive(layer, tokens), torch.float32)


def test_scores_of_any_size() -> None:
    """One key takes all the weight; none of the others may overflow or vanish as not-a-number."""
    layer = AttentionLayer(0, 4, 2, 16, 1.0)
    tokens = random_request(layer, 300, torch.float32, 1, heavy_tailed=True)
    found = PagedRequests(ReferenceAttention(), layer, [tokens]).in_chunks(0, [280, *[1] * 20])
    expected = naive(layer, tokens)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-3
