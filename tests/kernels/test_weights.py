"""Weights in panels: into them and back, from GGUF blocks, through a file."""

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from gpu_worker.kernels.huge_pages import CHUNK_BYTES, GrowingHugePages, HugePages
from gpu_worker.kernels.linear import MAX_INPUTS, Weight, WeightKind
from gpu_worker.kernels.linear_reference import unpacked

EACH_KIND = pytest.mark.parametrize("kind", list(WeightKind), ids=lambda kind: kind.name.lower())


def values(n=37, k=96):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.05


def dequantized(weight: Weight):
    found, *blocks = (each[:weight.n].double() for each in unpacked(weight))
    if weight.scales is not None:
        return found * weight.scales[:weight.n, None]
    if not blocks:
        return found
    scales, minima = (each.repeat_interleave(32, 1) for each in (blocks if len(blocks) == 2 else (*blocks, blocks[0] * 0)))
    return found * scales + minima


@EACH_KIND
@pytest.mark.parametrize("shape", [(16, 32), (37, 96), (1, 64), (64, 576)], ids="{0[0]}x{0[1]}".format)
def test_to_the_nearest(kind, shape):
    original = values(*shape)
    groups = original.view(shape[0], -1, 32)
    step = {WeightKind.FLOAT32: torch.zeros(1), WeightKind.BF16: original.abs() / 128,
            WeightKind.INT8: original.abs().amax(1, keepdim=True) / 127,
            WeightKind.INT8_BLOCKS: groups.abs().amax(2).repeat_interleave(32, 1) / 127,
            WeightKind.INT4_BLOCKS: (groups.amax(2) - groups.amin(2)).repeat_interleave(32, 1) / 15}[kind]
    error = (dequantized(Weight.from_float(kind, original)) - original).abs()
    assert (error <= 0.51 * step + 2e-3 * original.abs().max() * (kind == WeightKind.INT4_BLOCKS)).all()


@EACH_KIND
def test_zeros_stay_zeros(kind):
    assert not dequantized(Weight.from_float(kind, torch.zeros(20, 64))).any()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("shape", [(37, 96), (64, 576)], ids="{0[0]}x{0[1]}".format)
def test_blocks_of_a_gguf_file_as_they_stand(name, shape):
    kind = gguf.GGMLQuantizationType[name]
    blocks = gguf.quantize(values(*shape).numpy(), kind)
    weight = Weight.from_gguf_blocks(name, torch.from_numpy(blocks))
    assert (weight.n, weight.k) == shape
    assert np.array_equal(dequantized(weight).float().numpy(), gguf.dequantize(blocks, kind))


def test_a_minimum_beyond_float16_is_refused():
    block = np.zeros((1, 18), np.uint8)
    block[0, :2] = np.array([9000.0], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="does not fit into float16"):
        Weight.from_gguf_blocks("Q4_0", torch.from_numpy(block))


@EACH_KIND
def test_through_a_file_without_a_copy(kind, tmp_path):
    weight = Weight.from_float(kind, values(), torch.randn(37), k_block=32)
    safetensors.torch.save_file({f"q.{name}": tensor for name, tensor in weight.tensors().items()}, tmp_path / "w")
    loaded = {name.removeprefix("q."): tensor for name, tensor in safetensors.torch.load_file(tmp_path / "w").items()}
    again = Weight.from_tensors(loaded)
    assert again.panels.data_ptr() == loaded["panels"].data_ptr() == again.structure.panels
    assert (again.kind, again.n, again.k, again.k_block) == (kind, 37, 96, 32)
    for name, tensor in weight.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def header(kind, n=37, k=96, k_block=96):
    return {"header": torch.tensor([kind, n, k, k_block])}


@pytest.mark.parametrize(("kind", "change", "message"), [
    (WeightKind.INT8, header(9), "9 is not a valid WeightKind"),
    (WeightKind.INT8, header(WeightKind.BF16), r"panels: was uint8 \[3, 1536\]; allowed: uint8 \[3, 3072\]"),
    (WeightKind.BF16, header(WeightKind.INT8), r"panels: was uint8 \[3, 3072\]; allowed: uint8 \[3, 1536\]"),
    (WeightKind.INT4_BLOCKS, header(WeightKind.INT8_BLOCKS), r"panels: was uint8 \[3, 960\]; allowed: uint8 \[3, 1664\]"),
    (WeightKind.INT8, header(WeightKind.INT8, k=32768, k_block=32768), "panels: was"),
    (WeightKind.BF16, header(WeightKind.BF16, k_block=0), "k_block: was 0"),
    (WeightKind.BF16, header(WeightKind.BF16, k_block=-32), "k_block: was -32"),
    (WeightKind.INT8, header(WeightKind.INT8, n=49), r"panels: was uint8 \[3, 1536\]; allowed: uint8 \[4, 1536\]"),
    (WeightKind.INT8, header(WeightKind.INT8, n=0), "outputs of a product: was 0"),
    (WeightKind.INT8, {"header": torch.tensor([2, 37])}, r"header: was int64 \[2\]; allowed: int64 \[4\]"),
    (WeightKind.INT8, {"header": None}, "header is missing"), (WeightKind.INT8, {"panels": None}, "panels is missing"),
    (WeightKind.INT8, {"panels": torch.zeros(3, 1536, dtype=torch.int8)}, "panels: was int8"),
    (WeightKind.INT8, {"panels": torch.zeros(3 * 1536, dtype=torch.uint8)}, r"panels: was uint8 \[4608\]"),
    (WeightKind.INT8, {"panels": torch.zeros(1536, 3, dtype=torch.uint8).t()}, "panels: was not contiguous"),
    (WeightKind.INT8, {"scales": None}, "scales: was nothing; allowed: with INT8"),
    (WeightKind.BF16, {"scales": torch.ones(48)}, "scales: was a tensor; allowed: with INT8"),
    (WeightKind.INT8, {"scales": torch.ones(37)}, r"scales: was float32 \[37\]; allowed: float32 \[48\]"),
    (WeightKind.INT8, {"scales": torch.ones(48, dtype=torch.float64)}, r"scales: was float64 \[48\]; allowed: float32 \[48\]"),
    (WeightKind.INT8, {"bias": torch.ones(96)[::2]}, "bias: was not contiguous"),
    (WeightKind.INT8, {"bias": torch.ones(48).half()}, r"bias: was float16 \[48\]; allowed: float32 \[48\]"),
])
def test_tensors_that_do_not_go_together_are_refused(kind, change, message):
    """The kernels would read beyond their ends."""
    tensors = Weight.from_float(kind, values(), torch.randn(37)).tensors() | change
    with pytest.raises(ValueError, match=message):
        Weight.from_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_panels_are_whole_cache_lines():
    for kind in WeightKind:
        for k in (32, 64, 96, 576):
            assert Weight.from_float(kind, values(20, k)).panels.shape[1] % 64 == 0


@pytest.mark.parametrize(("k", "k_block", "message"), [
    (48, 48, "was 48; allowed: a multiple of 32"), (MAX_INPUTS + 32, 32, f"up to {MAX_INPUTS}"),
    (96, 48, "k_block: was 48"), (96, 128, "k_block: was 128")])
def test_shapes_that_no_kernel_has_are_refused(k, k_block, message):
    with pytest.raises(ValueError, match=message):
        Weight.from_float(WeightKind.BF16, torch.zeros(16, k), None, k_block)


@EACH_KIND
def test_moved_to_huge_pages(kind):
    weights = [Weight.from_float(kind, values(n), torch.randn(n)) for n in (37, 16)]
    tensors = [tensor for weight in weights for tensor in weight.tensors().values()]
    pages = HugePages.for_tensors(tensors)
    for weight in weights:
        moved = weight.moved(pages)
        for name, tensor in weight.tensors().items():
            copy = moved.tensors()[name]
            assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()
            assert name == "header" or copy.data_ptr() % 64 == 0
        assert moved.structure.panels == moved.panels.data_ptr()


def test_no_more_than_was_asked_for():
    pages = HugePages(64)
    pages.take(torch.zeros(9))
    with pytest.raises(AssertionError, match="no room"):
        pages.take(torch.zeros(1))


def test_more_huge_pages_whenever_they_are_used_up():
    pages = GrowingHugePages()
    large, small = torch.arange(CHUNK_BYTES // 8 + 5), torch.arange(20.0)
    copies = [pages.take(each) for each in (small, small, large, small)]
    assert all(torch.equal(copy, each) and copy.data_ptr() % 64 == 0 for copy, each in zip(copies, (small, small, large, small), strict=True))
    assert copies[1].data_ptr() - copies[0].data_ptr() == 128
