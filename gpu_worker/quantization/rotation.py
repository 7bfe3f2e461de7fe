"""A model whose residual stream is multiplied by one fixed orthogonal matrix: the same model.

Used by ``int8_model.py``.  A few channels of a residual stream are a hundred times larger than
the others, and an int8 scale for a whole row leaves nothing of these.  Behind a rotation all
channels are alike.  It is merged into the weights on both sides of the stream, once each norm's
own weight has gone into the products that follow it (a bare RMS norm does not see a rotation).
At run time nothing is left of it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from gpu_worker.models.decoder_parts import Affine, LayerTensors, TopTensors

LARGEST_FACTOR = 64                       # of the Kronecker product: a rotation costs a few multiplications a number
SIGN_MULTIPLIER = 0x9E3779B97F4A7C15      # golden ratio: the upper bit of its multiples looks random


class Rotation:
    """x → x · R for rows of ``size``, R a Kronecker product: Hadamard matrices for the power of two
    in ``size``, a dense orthogonal matrix for the odd rest, which every size has; and signs.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self._signs = torch.tensor([1.0 - 2.0 * ((i + 1) * SIGN_MULTIPLIER >> 63 & 1) for i in range(size)], dtype=dtype)
        power = size & -size
        factors = [_hartley(size // power)]
        while power > 1:
            factors.append(_hadamard(min(power, LARGEST_FACTOR)))
            power //= len(factors[-1])
        self._factors = [factor.to(dtype) for factor in factors if len(factor) > 1]

    def __call__(self, x: Tensor) -> Tensor:
        """[…, size] → […, size]."""
        rows = math.prod(x.shape[:-1])
        turned = x * self._signs
        for factor in reversed(self._factors):         # each takes the last axis to the front: in the end all are back
            turned = (turned.reshape(-1, len(factor)) @ factor).view(rows, -1, len(factor)).transpose(1, 2)
        return turned.reshape(x.shape)

    def outputs(self, affine: Affine) -> Affine:
        """A product whose outputs are rotated."""
        return Affine(self(affine.weight.t()).t(), None if affine.bias is None else self(affine.bias))

    def inputs(self, affine: Affine) -> Affine:
        """A product whose inputs come rotated."""
        return Affine(self(affine.weight), affine.bias)


class RotatedModel:
    """The tensors of a model in another place of the residual stream."""

    def __init__(self, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        self._stream = Rotation(hidden_size, dtype)

    def top(self, top: TopTensors) -> TopTensors:
        """The head has the final norm's weight in it: it is tied no longer."""
        return TopTensors(self._stream(top.embedding), torch.ones_like(top.norm), self._stream(top.head * top.norm))

    def layer(self, layer: LayerTensors) -> LayerTensors:
        stream = self._stream
        return dataclasses.replace(
            layer, input_norm=torch.ones_like(layer.input_norm), mlp_norm=torch.ones_like(layer.mlp_norm),
            qkv=stream.inputs(_scaled(layer.qkv, layer.input_norm)), output=stream.outputs(layer.output),
            gate_up=stream.inputs(_scaled(layer.gate_up, layer.mlp_norm)), down=stream.outputs(layer.down))


def _scaled(affine: Affine, norm: Tensor) -> Affine:
    """A norm's weight, in the product that takes what it gives."""
    return Affine(affine.weight * norm, affine.bias)


def _hadamard(size: int) -> Tensor:
    """float64 [size, size], size a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def _hartley(size: int) -> Tensor:
    """float64 [size, size]: orthogonal for every size, no entry above sqrt(2 / size)."""
    turn = torch.arange(size, dtype=torch.float64)
    angles = 2 * math.pi / size * (turn[:, None] * turn % size)
    return (angles.cos() + angles.sin()) / math.sqrt(size)
