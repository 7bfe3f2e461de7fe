"""The greedy token by the kernels against plain torch."""

import pytest
import torch

from gpu_worker.kernels.picker import SEGMENT, SHARED_FROM, KernelPicker
from gpu_worker.picking import TorchPicker
from protocol.steps import RowError

VOCAB = 3 * SEGMENT + 37
NAN, EMPTY = RowError.NAN_LOGITS, RowError.EMPTY_MASK


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def greedy(library, request):
    picker = KernelPicker(library, request.param)

    def token_ids_and_errors(logits, empty=NAN):
        sampled = picker.largest(logits, empty)
        return sampled.token_ids, sampled.errors

    return token_ids_and_errors


def logits(rows, vocab=VOCAB):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * 10


@pytest.mark.parametrize("vocab", [1, 7, 16, SEGMENT - 1, SEGMENT, VOCAB])
def test_the_largest(greedy, vocab):
    x = logits(5, vocab)
    token_ids, errors = greedy(x)
    assert torch.equal(token_ids, x.argmax(1)) and not errors.any()


def test_many_rows(greedy):
    x = logits(64)
    x[::3] = x[::3].round()
    assert x.numel() >= SHARED_FROM and torch.equal(greedy(x)[0], TorchPicker().largest(x, NAN).token_ids)


@pytest.mark.parametrize("places", [(0, 1), (3, VOCAB - 1), (SEGMENT - 1, SEGMENT), (2 * SEGMENT, 2 * SEGMENT + 5), (VOCAB - 2, VOCAB - 1)])
def test_the_lowest_id_of_equal_ones(greedy, places):
    x = logits(2).clamp_(max=5.0)
    x[1, list(places)] = 100.0
    assert greedy(x)[0][1] == places[0]
    assert greedy(torch.zeros(3, VOCAB))[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("place", [0, SEGMENT + 3, VOCAB - 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_fails_alone(greedy, place, bad):
    x = logits(3)
    expected = x.argmax(1)
    x[1, place] = bad
    token_ids, errors = greedy(x)
    assert errors.tolist() == [0, NAN, 0]
    assert token_ids[0] == expected[0] and token_ids[2] == expected[2] and 0 <= token_ids[1] < VOCAB


def test_masked_logits_are_no_error_unless_all_are(greedy):
    x = logits(2)
    x[0, torch.arange(VOCAB) != 4321] = float("-inf")
    x[1] = float("-inf")
    token_ids, errors = greedy(x, EMPTY)
    assert token_ids[0] == 4321 and errors.tolist() == [0, EMPTY]


@pytest.mark.parametrize("empty", [NAN, EMPTY])
def test_errors_are_torchs(greedy, empty):
    x = logits(7)
    for row, value in enumerate([float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 0.0]):
        x[row, 99] = value
    x[6] = float("-inf")
    expected = TorchPicker().largest(x, empty)
    token_ids, errors = greedy(x, empty)
    assert torch.equal(errors, expected.errors) and errors[6] == empty
    assert torch.equal(token_ids[errors == 0], expected.token_ids[errors == 0])


def test_rows_that_are_not_contiguous(greedy):
    x = logits(3, 64)
    assert torch.equal(greedy(x[:, ::2])[0], x[:, ::2].argmax(1)) and greedy(x[:1].expand(4, 64))[0].tolist() == [x[0].argmax().item()] * 4
