"""Paged attention by the kernels: against float64 and the reference backend, and its bits against themselves."""

import pytest
import torch

from attention_requests import Requests, in_chunks, together
from gpu_worker.attention.cpu import CpuAttention
from gpu_worker.attention.reference import ReferenceAttention

FLOAT, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
TYPES = pytest.mark.parametrize(("dtype", "kv_dtype"), [(a, b) for a in (FLOAT, BF16) for b in (FLOAT, BF16, INT8)], ids=str)
KV_TYPES = pytest.mark.parametrize("kv_dtype", [FLOAT, BF16, INT8], ids=str)
LENGTHS = [1, 31, 32, 33, 70, 256, 257, 300]


@pytest.fixture
def attention(library):
    return CpuAttention(library, 2)


@pytest.fixture
def lengths(library):
    return [1, 33, 270] if "emulated" in library.level else LENGTHS


def bits(x):
    return x.contiguous().view(torch.int16 if x.dtype == BF16 else torch.int32)


def equal(found, expected):
    return found.keys() <= expected.keys() and all(torch.equal(bits(found[r]), bits(expected[r])) for r in found)


def check(requests, found, loose=1.0):
    """Against float64; activations in bfloat16 round the result, and perhaps the weights, to 8 bits."""
    allowed = {FLOAT: 2e-6, BF16: 6e-3}[requests.dtype] * loose
    for request, output in found.items():
        expected = requests.exact(request)[:len(output)]
        difference = float(((output.double() - expected).abs() / (1 + expected.abs())).max())
        assert difference <= allowed, request


@TYPES
def test_against_float64_and_the_reference(attention, lengths, dtype, kv_dtype):
    requests = Requests.random(lengths, dtype, kv_dtype)
    found = requests.attended(attention, together(lengths))
    check(requests, found)
    reference = requests.attended(ReferenceAttention(), together(lengths), seed=1)
    check(requests, reference)
    for request, output in found.items():
        torch.testing.assert_close(output, reference[request], rtol=2e-2 if dtype == BF16 else 1e-4, atol=1e-2 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (4, 1), (5, 1), (7, 1), (8, 1), (14, 2), (71, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_group_sizes(attention, dtype, heads, kv_heads):
    requests = Requests.random([40, 1, 5], dtype, heads=heads, kv_heads=kv_heads, dim=16)
    check(requests, requests.attended(attention, [*together([39, 1, 4]), [(0, 1), (2, 1)]]))


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 96, 128, 256])
@TYPES
def test_head_dims(attention, dtype, kv_dtype, dim):
    requests = Requests.random([45, 3], dtype, kv_dtype, dim=dim, heads=3, kv_heads=1)
    check(requests, requests.attended(attention, [*together([44, 2]), [(0, 1), (1, 1)]]))


@pytest.mark.parametrize("window", [1, 2, 32, 33, 100, 256, 400])
@TYPES
def test_windows(attention, dtype, kv_dtype, window):
    requests = Requests.random([330, 40], dtype, kv_dtype, window=window, dim=16, heads=2, kv_heads=1)
    check(requests, requests.attended(attention, [*together([325, 39]), [(1, 1), (0, 1)], [(0, 4)]]))


@TYPES
def test_softcap(attention, dtype, kv_dtype):
    requests = Requests.random([300, 9], dtype, kv_dtype, softcap=3.0, spread=2.0)
    assert (requests.exact(0) - Requests.random([300, 9], dtype, kv_dtype, spread=2.0).exact(0)).abs().max() > 0.3
    check(requests, requests.attended(attention, together([300, 9])), loose=4.0)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_scores_far_apart(attention, dtype):
    """Weights that underflow, and a maximum that changes from segment to segment."""
    requests = Requests.random([600], dtype, spread=6.0)     # scores of hundreds, with as much more rounding
    check(requests, requests.attended(attention, together([600])), loose=200.0 if dtype == FLOAT else 4.0)


@pytest.mark.parametrize("window", [None, 37])
@TYPES
def test_bits_of_a_token_alone_and_in_any_chunk(library, dtype, kv_dtype, window):
    """Decode and prefill of the same position, 1 and 2 threads, any block ids."""
    length = 300
    requests = Requests.random([length], dtype, kv_dtype, window=window, heads=3, kv_heads=1)
    whole = requests.attended(CpuAttention(library, 1), together([length]))
    for seed, chunks in enumerate([(20, *[1] * 20), (32,), (7, 64, 1, 33), (255, 1, 44)]):
        for threads in (1 + seed % 2,) if "emulated" in library.level else (1, 2):
            assert equal(requests.attended(CpuAttention(library, threads), in_chunks(0, length, chunks), seed=seed + threads), whole), chunks


@TYPES
def test_bits_of_a_request_among_others(attention, lengths, dtype, kv_dtype):
    requests = Requests.random(lengths, dtype, kv_dtype, heads=3, kv_heads=1)
    alone = {}
    for request, length in enumerate(lengths):
        alone |= requests.attended(attention, in_chunks(request, length, (50,)), seed=request)
    assert equal(requests.attended(attention, together(lengths)), alone)
    some = [(r, n) for r, n in enumerate(lengths) if n > 30]
    mixed = [[(r, n - 5) for r, n in reversed(some)], *[[(r, 1) for r, _ in some]] * 3, [(some[0][0], 2)], [(r, 2) for r, _ in some[1:]]]
    assert equal(requests.attended(attention, mixed), alone)


@TYPES
def test_bits_of_segments_shared_by_units(library, dtype, kv_dtype):
    """More threads than there are heads: a block's segments are computed apart and merged."""
    length = 1100
    requests = Requests.random([length], dtype, kv_dtype, heads=2, kv_heads=1, dim=16)
    steps = in_chunks(0, length, (length - 3, 1, 1, 1))
    whole = requests.attended(CpuAttention(library, 1), steps)
    check(requests, whole)
    for threads in (2, 3, 8):
        assert equal(requests.attended(CpuAttention(library, threads), steps, seed=threads), whole), threads


@TYPES
@pytest.mark.parametrize(("lengths", "last", "window"), [([1100] * 3, 1, None), ([1100] * 4, 1, None), ([656] * 4, 2, 400)],
                         ids=["two heads and one", "three heads", "three heads in a window"])
def test_bits_of_segments_and_heads_shared_by_units(library, dtype, kv_dtype, lengths, last, window):
    """Few query rows: a unit reads some segments of several KV heads, and the last one merges them."""
    requests = Requests.random(lengths, dtype, kv_dtype, heads=6, kv_heads=3, dim=16, window=window)
    steps = [[(request, length - last) for request, length in enumerate(lengths)], [(request, last) for request in range(len(lengths))]]
    whole = {}
    for request, length in enumerate(lengths):
        whole |= requests.attended(CpuAttention(library, 1), in_chunks(request, length, (length,)))
    assert equal(requests.attended(CpuAttention(library, 2), steps, seed=1), whole)


@TYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_queries_that_are_not_finite_harm_only_their_own_row(attention, dtype, kv_dtype, bad):
    lengths = [70, 1, 33]
    requests = Requests.random(lengths, dtype, kv_dtype)
    clean = requests.attended(attention, together(lengths))
    requests.qkv[0][40, 1, 7] = bad                     # head 1 of a token within a block
    requests.qkv[1][0, 5, 0] = bad
    spoilt = requests.attended(attention, together(lengths))
    dim = requests.layer.head_dim
    for request, (token, head) in {0: (40, 1), 1: (0, 5)}.items():
        own = spoilt[request].view(-1, requests.layer.num_heads, dim)
        assert torch.isnan(own[token, head]).all()
        own[token, head] = clean[request].view(-1, requests.layer.num_heads, dim)[token, head]
    assert equal(spoilt, clean)


@TYPES
def test_keys_and_values_of_later_tokens_are_not_read(attention, dtype, kv_dtype):
    """Even within one chunk: a token's result is as if those behind it were not there."""
    requests = Requests.random([100], dtype, kv_dtype)
    clean = requests.attended(attention, together([100]))
    for token in (70, 33):
        requests.qkv[0][token:, requests.layer.num_heads:] = float("nan")
        spoilt = requests.attended(attention, together([100]))
        assert torch.equal(bits(spoilt[0][:token]), bits(clean[0][:token]))
        assert torch.isnan(spoilt[0][token:]).all()


@KV_TYPES
def test_values_before_the_window_are_not_read(attention, kv_dtype):
    requests = Requests.random([300], BF16, kv_dtype, window=33)
    clean = requests.attended(attention, together([300]))
    requests.qkv[0][:100, requests.layer.num_heads:] = float("nan")
    spoilt = requests.attended(attention, in_chunks(0, 300, (64, 1)))
    assert torch.equal(bits(spoilt[0][132:]), bits(clean[0][132:]))


def test_steps_may_overlap(attention):
    """Two steps begun before either attends, with plans of their own."""
    first, second = Requests.random([40], seed=1), Requests.random([90], seed=2)
    expected = first.attended(attention, together([40])), second.attended(attention, together([90]))

    class Nested:
        def begin(self, metadata, kv):
            step = attention.begin(metadata, kv)
            assert equal(second.attended(attention, together([90])), expected[1])
            return step

    assert equal(first.attended(Nested(), together([40])), expected[0])
