"""The greedy token against the sampler's."""

import pytest
import torch

from gpu_worker.kernels.greedy import SEGMENT, Greedy
from gpu_worker.sampler import _errors
from protocol.steps import RowError

VOCAB = 3 * SEGMENT + 37


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def greedy(library, request):
    return Greedy(library, request.param)


def logits(rows, vocab=VOCAB):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * 10


@pytest.mark.parametrize("vocab", [1, 7, 16, SEGMENT - 1, SEGMENT, VOCAB])
def test_the_largest(greedy, vocab):
    x = logits(5, vocab)
    token_ids, errors = greedy(x)
    assert torch.equal(token_ids, x.argmax(1)) and not errors.any()


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
    assert errors.tolist() == [0, RowError.NAN_LOGITS, 0]
    assert token_ids[0] == expected[0] and token_ids[2] == expected[2] and 0 <= token_ids[1] < VOCAB


def test_masked_logits_are_no_error_unless_all_are(greedy):
    x = logits(2)
    x[0, torch.arange(VOCAB) != 4321] = float("-inf")
    x[1] = float("-inf")
    token_ids, errors = greedy(x)
    assert token_ids[0] == 4321 and errors.tolist() == [0, RowError.NAN_LOGITS]


def test_errors_are_the_samplers(greedy):
    x = logits(7)
    for row, value in enumerate([float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 0.0]):
        x[row, 99] = value
    x[6] = float("-inf")
    largest, expected = x.max(1)
    token_ids, errors = greedy(x)
    assert torch.equal(errors, _errors(largest, allowed_none=RowError.NAN_LOGITS))
    assert torch.equal(token_ids[errors == 0], expected[errors == 0])
