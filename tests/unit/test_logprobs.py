"""Logprobs, ranks and the best ids against sorting each row in the test."""

from __future__ import annotations

import numpy as np
import torch

from gpu_worker.logprobs import NO_ID, best_ids, logprobs_of, spread
from protocol.codec import f32_column, i32_column

VOCAB = 700


def tied_logits(count: int, seed: int = 0) -> torch.Tensor:
    """Few different values, so that nearly every row has ties among its best."""
    return torch.randint(-6, 7, (count, VOCAB), generator=torch.Generator().manual_seed(seed)).float()


def by_rank(row: torch.Tensor) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i].item(), i))


def test_best_ids_order_ties_by_lowest_id() -> None:
    values = torch.cat((tied_logits(20), torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(1)), -tied_logits(3).abs() * 0.0))
    values[5, 300:] = float("-inf")
    for count in (1, 2, 5, 20):
        assert best_ids(values, count).tolist() == [by_rank(row)[:count] for row in values]
    assert best_ids(values, VOCAB).tolist() == [by_rank(row) for row in values]
    assert best_ids(values, 0).shape == (len(values), 0)


def test_values_and_ranks() -> None:
    logits = torch.cat((tied_logits(30, seed=2), torch.randn(30, VOCAB, generator=torch.Generator().manual_seed(3)) * 5))
    given = torch.randint(0, VOCAB, (60,), generator=torch.Generator().manual_seed(4))
    found = logprobs_of(logits, given, np.full(60, 4), 4)
    exact = logits.double().log_softmax(-1)
    for row in range(60):
        order = by_rank(logits[row])
        assert found.ids[row].tolist() == [given[row].item(), *order[:4]]
        assert np.allclose(found.values[row], exact[row, found.ids[row]], rtol=0, atol=1e-5)
        assert found.ranks[row] == 1 + order.index(given[row].item())


def test_bits_do_not_depend_on_the_rows_beside() -> None:
    logits = torch.randn(33, VOCAB, generator=torch.Generator().manual_seed(5)) * 3
    given = torch.arange(33)
    together = logprobs_of(logits, given, np.full(33, 5), 5)
    for row in range(33):
        alone = logprobs_of(logits[row:row + 1].clone(), given[row:row + 1], np.array([5]), 5)
        assert alone.values.tobytes() == together.values[row].tobytes() and alone.ids.tolist() == together.ids[row:row + 1].tolist()


def test_columns_that_a_row_did_not_ask_for() -> None:
    found = logprobs_of(tied_logits(3), torch.tensor([7, 8, 9]), np.array([0, 2, 3]), 3)
    assert found.ids.shape == (3, 4)
    assert (found.ids == NO_ID).sum(1).tolist() == [3, 1, 0] and (found.values[found.ids == NO_ID] == 0).all()
    rows = spread(found, np.array([1, 2, 4]), 5)
    ids = i32_column(rows.ids, 20).reshape(5, 4)
    assert ids[[1, 2, 4]].tolist() == found.ids.tolist() and (ids[[0, 3]] == NO_ID).all()
    assert f32_column(rows.values, 20).reshape(5, 4)[4].tolist() == found.values[2].tolist()
    assert i32_column(rows.ranks, 5)[[0, 3]].tolist() == [0, 0]


def test_more_than_the_vocabulary() -> None:
    found = logprobs_of(tied_logits(2)[:, :6], torch.tensor([0, 1]), np.array([20, 20]), 20)
    assert found.ids.shape == (2, 7) and sorted(found.ids[0, 1:].tolist()) == list(range(6))
