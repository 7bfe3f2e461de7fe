"""QK-norm, rotary embedding and the write into the cache, against torch; and how the cache lies in memory."""

import pytest
import torch

from gpu_worker.attention.interface import AttentionLayer
from gpu_worker.kernels.attention import KVLayer, rope_and_store
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.layers import rotate
from gpu_worker.models.spec import ModelSpec

FLOAT, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
TYPES = pytest.mark.parametrize(("dtype", "kv_dtype"), [(a, b) for a in (FLOAT, BF16) for b in (FLOAT, BF16, INT8)], ids=str)
HEADS, KV_HEADS, TOKENS, BLOCKS, EPS = 6, 2, 70, 7, 1e-5


class Case:
    """Tokens at random positions and slots; every seventh is padding."""

    def __init__(self, dtype, kv_dtype, dim):
        generator = torch.Generator().manual_seed(dim)
        self.dim, self.dtype, self.kv_dtype = dim, dtype, kv_dtype
        self.qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * dim, generator=generator).to(dtype)
        self.norms = tuple((1 + torch.randn(dim, generator=generator) / 4).to(dtype) for _ in range(2))
        angles = torch.arange(200)[:, None] * 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
        self.cosines, self.sines = angles.cos(), angles.sin()
        self.positions = torch.randint(0, 200, (TOKENS,), generator=generator)
        self.slots = torch.randperm(BLOCKS * 32, generator=generator)[:TOKENS]
        self.slots[::7] = -1
        layer = AttentionLayer(0, HEADS, KV_HEADS, dim, 1.0)
        self.kv = KVCache(ModelSpec("test", "decoder", (layer,), 0, 0, 0, dtype, (), True), BLOCKS, kv_dtype, torch.device("cpu"))
        self.kv.fill_with_nan()

    def run(self, library, threads, with_norms=False):
        return rope_and_store(library, self.qkv, self.norms if with_norms else None, EPS, self.cosines, self.sines, self.positions,
                              self.slots, KVLayer.of(self.kv.layers[0]), threads)

    def heads(self):
        return self.qkv.view(TOKENS, -1, self.dim).split((HEADS, KV_HEADS, KV_HEADS), dim=1)

    def angles(self):
        return self.cosines[self.positions][:, None], self.sines[self.positions][:, None]

    def stored(self):
        """K and V of the tokens with a slot, as floats [tokens, KV_HEADS, dim], by the layout of kv.h."""
        layer, real = self.kv.layers[0], self.slots[self.slots >= 0]
        tiles = (BLOCKS, KV_HEADS)
        if self.kv_dtype == BF16:
            key = layer.key.view(*tiles, self.dim // 2, 32, 2).permute(0, 3, 1, 2, 4).reshape(BLOCKS * 32, KV_HEADS, self.dim)
            value = layer.value.view(*tiles, 16, self.dim, 2).permute(0, 2, 4, 1, 3).reshape(BLOCKS * 32, KV_HEADS, self.dim)
        else:
            key = layer.key.view(*tiles, self.dim, 32).permute(0, 3, 1, 2).reshape(BLOCKS * 32, KV_HEADS, self.dim)
            value = layer.value.permute(0, 2, 1, 3).reshape(BLOCKS * 32, KV_HEADS, self.dim)
        if self.kv_dtype != INT8:
            return key[real].float(), value[real].float()
        scales = [scale.permute(0, 2, 1).reshape(BLOCKS * 32, KV_HEADS, 1)[real] for scale in (layer.key_scale, layer.value_scale)]
        return key[real] * scales[0], value[real] * scales[1]


def close(found, expected, dtype, step=0.0):
    allowed = {FLOAT: 1e-6, BF16: 4e-3, INT8: 0.0}[dtype]
    assert ((found.double() - expected).abs() <= allowed * expected.abs() + 1e-6 + step).all()


@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("dim", [16, 48, 64, 80])
@TYPES
def test_against_float64(library, dtype, kv_dtype, dim, with_norms):
    case = Case(dtype, kv_dtype, dim)
    query, key, value = (x.double() for x in case.heads())
    if with_norms:
        query, key = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm.double()
                      for x, norm in zip((query, key), case.norms, strict=True))
    cosines, sines = (x.double() for x in case.angles())
    query, key = (torch.cat((x[..., :dim // 2] * cosines - x[..., dim // 2:] * sines, x[..., dim // 2:] * cosines + x[..., :dim // 2] * sines), -1)
                  for x in (query, key))
    close(case.run(library, 2, with_norms), query, dtype)
    for found, expected in zip(case.stored(), (key, value), strict=True):
        expected = expected[case.slots >= 0]
        close(found, expected, kv_dtype, step=expected.abs().amax(-1, keepdim=True) / 253 if kv_dtype == INT8 else 0.0)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_bits_of_the_rotation_are_torchs(library, dtype):
    case = Case(dtype, dtype, 64)
    queries = case.run(library, 1)
    query, key, value = case.heads()
    assert torch.equal(queries, rotate(query, *case.angles()))
    real = case.slots >= 0
    for found, expected in zip(case.stored(), (rotate(key, *case.angles()), value), strict=True):
        assert torch.equal(found, expected[real].float())


@pytest.mark.parametrize("kv_dtype", [FLOAT, BF16, INT8], ids=str)
def test_nothing_else_is_written(library, kv_dtype):
    case = Case(BF16, kv_dtype, 16)
    case.run(library, 2)
    before = [tensor.clone() for tensor in case.kv.layers[0].tensors()]
    case.slots[:] = -1
    case.qkv.add_(1)
    case.run(library, 2)
    for old, new in zip(before, case.kv.layers[0].tensors(), strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


@TYPES
def test_bits_with_one_thread_and_two(library, dtype, kv_dtype):
    one, two = Case(dtype, kv_dtype, 64), Case(dtype, kv_dtype, 64)
    assert torch.equal(one.run(library, 1, with_norms=True), two.run(library, 2, with_norms=True))
    for a, b in zip(one.kv.layers[0].tensors(), two.kv.layers[0].tensors(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
