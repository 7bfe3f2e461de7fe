"""Matrix products: their bits against plain torch and against themselves, exact sums, float64.

Levels without the bfloat16 instruction follow the reference bit for bit in every kind; with it,
bfloat16 products have the instruction's own bits.
"""

import functools

import pytest
import torch

from gpu_worker.kernels.elementwise import Elementwise, Output, QuantizedRows
from gpu_worker.kernels.linear import ALLOWED_INPUTS, INTEGERS, MAX_INPUTS, InputKind, Linear, Weight, WeightKind
from gpu_worker.kernels.linear_reference import LinearReference, unpacked

FORMS = [(weight, rows) for weight, allowed in ALLOWED_INPUTS.items() for rows in allowed]
EACH_FORM = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0].name}-{form[1].name}".lower())
LAYER_SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]      # outputs, inputs of the default model
HEAD_SHAPE = (49152, 576)
ODD_SHAPES = [(1, 32), (37, 96), (50, 160), (16, 544)]
COUNTS = (1, 2, 3, 4, 5, 8, 33, 64)                                    # rows, against 128


def spread(rows, width, seed=0):
    """Rows with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * 2.0 ** torch.randint(-8, 9, (rows, width), generator=generator)


@functools.cache
def weight(kind, n, k, k_block=None):
    generator = torch.Generator().manual_seed(n + k)
    bias = torch.randn(n, generator=generator) if n % 2 else None
    return Weight.from_float(kind, torch.randn(n, k, generator=generator) * 0.05, bias, k_block)


def given(library, form, x):
    """``x`` in the form of rows that is asked for."""
    if form[1] in (InputKind.FLOAT32, InputKind.BF16):
        return x if form[1] == InputKind.FLOAT32 else x.bfloat16()
    return Elementwise(library, 1).quantize(x, Output.PER_TOKEN if form[1] == InputKind.PER_TOKEN else Output.PER_GROUP)


def part(rows, start, count):
    """Some of the rows, at a place of their own in memory."""
    if isinstance(rows, QuantizedRows):
        return QuantizedRows(*(part(each, start, count) for each in (rows.values, rows.scales, rows.sums)))
    return rows[start:start + count].clone()


def has_own_bits(library, form):
    return form[0] == WeightKind.BF16 and library.level in ("avx512_bf16", "emulated_avx512")


def assert_same_bits_alone(library, product, rows, counts):
    """Each run of rows alone and among all, by 1 and 2 threads; emulated, at one place each."""
    whole = Linear(library, product, 2, torch.float32)(rows)
    for i, count in enumerate(counts):
        places = [(0, 1), (len(whole) - count, 2), ((len(whole) - count) // 2, 1 + i % 2)]
        for start, threads in places[i % 3:i % 3 + 1] if "emulated" in library.level else places:
            alone = Linear(library, product, threads, torch.float32)(part(rows, start, count))
            assert torch.equal(alone, whole[start:start + count]), f"{count} rows from {start} on, {threads} threads"


@EACH_FORM
@pytest.mark.parametrize(("shape", "dtype"), [*((shape, torch.float32) for shape in ODD_SHAPES), (ODD_SHAPES[1], torch.bfloat16)], ids=str)
def test_bits_of_the_reference(library, form, shape, dtype):
    if has_own_bits(library, form):
        pytest.skip("the instruction's own")
    product = weight(form[0], *shape)
    for count in (1, 6):
        rows = given(library, form, spread(count, shape[1], count))
        assert torch.equal(Linear(library, product, 2, dtype)(rows), LinearReference(product, dtype)(rows))


@EACH_FORM
def test_bits_of_the_reference_at_a_shape_of_the_model(library, form):
    if has_own_bits(library, form):
        pytest.skip("the instruction's own")
    product, rows = weight(form[0], 576, 1536), given(library, form, spread(9, 1536))
    assert torch.equal(Linear(library, product, 2, torch.float32)(rows), LinearReference(product, torch.float32)(rows))


@EACH_FORM
@pytest.mark.parametrize("shape", LAYER_SHAPES, ids="{0[0]}x{0[1]}".format)
def test_a_row_has_its_bits_among_any_others(library, form, shape):
    rows = given(library, form, spread(128, shape[1]))
    assert_same_bits_alone(library, weight(form[0], *shape), rows, COUNTS)


@EACH_FORM
@pytest.mark.parametrize("shape", ODD_SHAPES, ids="{0[0]}x{0[1]}".format)
def test_so_in_odd_shapes(library, form, shape):
    rows = given(library, form, spread(128, shape[1]))
    assert_same_bits_alone(library, weight(form[0], *shape), rows, (*range(1, 14), 23))


@pytest.mark.parametrize("shape", [(1, 32), (37, 96), (960, 32), (5000, 32)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("count", [1, 8, 9, 70])
def test_more_threads_than_work_or_processors(library, shape, count):
    product, rows = weight(WeightKind.FLOAT32, *shape), spread(count, shape[1])
    expected, *found = [Linear(library, product, threads, torch.float32)(rows) for threads in (1, 3, 7)]
    assert all(torch.equal(each, expected) for each in found)


@EACH_FORM
def test_so_in_the_head(library, form):
    few = "emulated" in library.level
    rows = given(library, form, spread(9 if few else 33, HEAD_SHAPE[1]))
    assert_same_bits_alone(library, weight(form[0], *HEAD_SHAPE), rows, (1, 5) if few else (1, 4, 8))


@EACH_FORM
def test_against_float64(library, form):
    product, x = weight(form[0], 577, 576), spread(7, 576)
    rows = given(library, form, x)
    values, *blocks = (each[:577].double() for each in unpacked(product))
    if blocks:
        scales, minima = (each.repeat_interleave(32, 1) for each in (blocks if len(blocks) == 2 else (*blocks, blocks[0] * 0)))
        values = values * scales + minima
    elif product.scales is not None:
        values = values * product.scales[:577, None].double()
    inputs = rows.double() if isinstance(rows, torch.Tensor) else (
        rows.values.double() * rows.scales.reshape(7, -1).double().repeat_interleave(576 // rows.scales.reshape(7, -1).shape[1], 1))
    expected = inputs @ values.t() + product.bias[:577].double()
    scale = inputs.abs() @ values.abs().t()      # what is summed
    found = Linear(library, product, 2, torch.float32)(rows)
    assert ((found - expected).abs() <= 3e-6 * scale).all()


@pytest.mark.parametrize("form", FORMS[2:], ids=lambda form: f"{form[0].name}-{form[1].name}".lower())
@pytest.mark.parametrize("k", [32, 1024])
def test_integer_sums_are_exact_at_full_range(library, form, k):
    """All at the ends of their ranges: of one sign, where partial sums are largest, and of both."""
    generator = torch.Generator().manual_seed(k)
    low, high = max(-127, INTEGERS[form[0]][0]), INTEGERS[form[0]][1]       # with −128 a sum of 1,024 would reach 2^24
    mixed = torch.randint(0, 2, (17, k), generator=generator) * (high - low) + low
    weights = torch.cat((torch.full((2, k), high), torch.full((1, k), low), mixed))
    values = torch.cat((torch.full((1, k), 127), torch.full((1, k), -128), torch.full((1, k), -127),
                        torch.randint(0, 2, (6, k), generator=generator) * 254 - 127)).to(torch.int8)
    parts = (9,) if form[1] == InputKind.PER_TOKEN else (9, k // 32)
    rows = QuantizedRows(values, torch.ones(parts), values.view(*parts, -1).sum(-1, dtype=torch.int32))
    exact = values.long() @ weights.long().t()
    assert exact.abs().max() < 2**24        # floats hold them, and all sums on the way
    for count in (1, 3, 9):
        found = Linear(library, Weight.from_integers(form[0], weights), 1, torch.float32)(part(rows, 0, count))
        assert torch.equal(found, exact[:count].float())


def test_sums_over_the_most_inputs(library):
    """32,768 inputs: the sum fits into 32 bits, and is rounded once."""
    values = torch.tensor([[127], [-127]], dtype=torch.int8).repeat(1, MAX_INPUTS)
    rows = QuantizedRows(values, torch.ones(2), values.sum(1, dtype=torch.int32))
    found = Linear(library, Weight.from_integers(WeightKind.INT8, values.repeat(9, 1)), 2, torch.float32)(rows)
    assert torch.equal(found, (values.long() @ values.repeat(9, 1).long().t()).float())


@EACH_FORM
def test_many_rows_of_the_most_inputs(library, form):
    """What a thread widens lies on its stack."""
    rows = given(library, form, spread(9, MAX_INPUTS))
    assert_same_bits_alone(library, weight(form[0], 33, MAX_INPUTS), rows, (1, 6))


@pytest.mark.parametrize("kind", [WeightKind.FLOAT32, WeightKind.BF16], ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("k_block", [32, 512, 1024])
def test_inputs_in_blocks(library, kind, k_block):
    """Partial sums from zero, added in order."""
    form = (kind, ALLOWED_INPUTS[kind][0])
    rows = given(library, form, spread(6, 1536))
    whole = Linear(library, weight(kind, 64, 1536), 1, torch.float32)
    cut = Linear(library, weight(kind, 64, 1536, k_block), 1, torch.float32)(rows)
    assert not torch.equal(cut, whole(rows))
    expected = torch.zeros(6, 64)
    values = unpacked(whole.weight)[0]
    for start in range(0, 1536, k_block):
        block = Weight.from_float(kind, values[:, start:start + k_block])
        expected = expected + Linear(library, block, 1, torch.float32)(rows[:, start:start + k_block].contiguous())
    assert torch.equal(cut, expected)


@EACH_FORM
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_alone(library, form, bad):
    x = spread(9, 576)
    product = Linear(library, weight(form[0], 576, 576), 2, torch.float32)
    clean = product(given(library, form, x))
    x[4, 100] = bad
    found = product(given(library, form, x))
    assert not torch.isfinite(found[4]).any()
    assert torch.equal(torch.cat((found[:4], found[5:])), torch.cat((clean[:4], clean[5:])))


@EACH_FORM
def test_no_rows_at_all(library, form):
    assert Linear(library, weight(form[0], 37, 96), 2, torch.float32)(given(library, form, spread(0, 96))).shape == (0, 37)


def test_rows_of_another_form_are_refused(library):
    product = Linear(library, weight(WeightKind.INT4_BLOCKS, 37, 96), 1, torch.float32)
    with pytest.raises(AssertionError, match="INT4_BLOCKS does not take PER_TOKEN rows"):
        product(given(library, (None, InputKind.PER_TOKEN), spread(2, 96)))
    with pytest.raises(AssertionError, match="k inputs"):
        product(given(library, (None, InputKind.PER_GROUP), spread(2, 64)))
