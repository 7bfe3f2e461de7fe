"""A rotated model is the same model: in float64, to the last digits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.models.decoder_parts import Affine, LayerTensors, TopTensors
from gpu_worker.quantization.rotation import RotatedModel, Rotation

HIDDEN, INNER, DIM, HEADS, KV_HEADS, VOCAB = 96, 64, 8, 4, 2, 50


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_model(seed: int = 0) -> tuple[TopTensors, list[LayerTensors]]:
    """With everything that a layer may have, and a few channels that are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.ones(HIDDEN, dtype=torch.float64)
    large[[3, 40]] = 50.0

    def affine(outputs: int, inputs: int) -> Affine:
        return Affine(normal(generator, outputs, inputs) / inputs**0.5, normal(generator, outputs))

    layers = []
    for _ in range(2):
        output, down = affine(HIDDEN, HEADS * DIM), affine(HIDDEN, INNER)
        layers.append(LayerTensors(
            input_norm=normal(generator, HIDDEN) + 1, qkv=affine((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
            query_norm=normal(generator, DIM) + 1, key_norm=normal(generator, DIM) + 1,
            output=Affine(output.weight * large[:, None], output.bias), mlp_norm=normal(generator, HIDDEN) + 1,
            gate_up=affine(2 * INNER, HIDDEN), down=Affine(down.weight * large[:, None], down.bias)))
    embedding = normal(generator, VOCAB, HIDDEN)
    return TopTensors(embedding * large, normal(generator, HIDDEN) + 1, embedding), layers


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def run(top: TopTensors, layers: list[LayerTensors], ids: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [tokens, vocab], the residual stream before the last norm); no positions: they do not touch it."""
    hidden = top.embedding[ids]
    for layer in layers:
        heads = F.linear(rms_norm(hidden, layer.input_norm), layer.qkv.weight, layer.qkv.bias).view(len(ids), -1, DIM).transpose(0, 1)
        query, key = rms_norm(heads[:HEADS], layer.query_norm), rms_norm(heads[HEADS:-KV_HEADS], layer.key_norm)
        key, value = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (key, heads[-KV_HEADS:]))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1).reshape(len(ids), -1)
        hidden = hidden + F.linear(attended, layer.output.weight, layer.output.bias)
        gate, up = F.linear(rms_norm(hidden, layer.mlp_norm), layer.gate_up.weight, layer.gate_up.bias).chunk(2, -1)
        hidden = hidden + F.linear(F.silu(gate) * up, layer.down.weight, layer.down.bias)
    return F.linear(rms_norm(hidden, top.norm), top.head), hidden


@pytest.mark.parametrize("size", [1, 32, 64, 96, 160, 576, 896])
def test_every_size_has_an_orthogonal_matrix(size: int) -> None:
    matrix = Rotation(size, torch.float64)(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert matrix.abs().max() <= 1.4143 / size**0.5          # no channel of the stream is left by itself


def test_the_rotated_model_is_the_same() -> None:
    top, layers = random_model()
    rotated = RotatedModel(HIDDEN, torch.float64)
    ids = torch.arange(VOCAB)
    logits, hidden = run(top, layers, ids)
    found, turned = run(rotated.top(top), [rotated.layer(layer) for layer in layers], ids)
    assert torch.allclose(found, logits, rtol=1e-10, atol=1e-10)
    assert torch.allclose(turned, Rotation(HIDDEN, torch.float64)(hidden), rtol=1e-9, atol=1e-9)


def test_large_channels_are_gone() -> None:
    """What the rotation is for: the largest number of a row, in units of the row's rms."""
    top, layers = random_model()
    rotated = RotatedModel(HIDDEN, torch.float64)
    ids = torch.arange(VOCAB)
    crests = []
    for model in ((top, layers), (rotated.top(top), [rotated.layer(layer) for layer in layers])):
        hidden = run(*model, ids)[1]
        crests.append(float((hidden.abs().amax(-1) / hidden.square().mean(-1).sqrt()).mean()))
    assert crests[0] > 6 and crests[1] < 3


def test_norms_are_in_the_products_and_biases_turn_with_the_stream() -> None:
    top, layers = random_model()
    rotated = RotatedModel(HIDDEN, torch.float64)
    layer = rotated.layer(layers[0])
    assert torch.equal(layer.input_norm, torch.ones(HIDDEN)) and torch.equal(layer.mlp_norm, torch.ones(HIDDEN))
    assert torch.equal(rotated.top(top).norm, torch.ones(HIDDEN))
    assert torch.equal(layer.qkv.bias, layers[0].qkv.bias) and torch.equal(layer.gate_up.bias, layers[0].gate_up.bias)
    assert not torch.allclose(layer.down.bias, layers[0].down.bias)
    without = dataclasses.replace(layers[0], down=Affine(layers[0].down.weight, None))
    assert rotated.layer(without).down.bias is None
