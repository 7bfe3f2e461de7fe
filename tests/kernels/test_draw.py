"""Random tokens by the kernels against plain torch: what is kept, what is drawn, and the same bits in any company.

Noise in the middle of a token's share of the total draws it, whatever the order of sums; so a
draw for each kept token shows the whole set.
"""

import numpy as np
import pytest
import torch

from gpu_worker.kernels.picker import SHARED_FROM, KernelPicker
from gpu_worker.picking import TorchPicker, _padded_copy, _weights
from gpu_worker.request_states import PARAMS_DTYPE
from kernel_levels import EMULATED, EMULATED_BASE, levels, opened
from protocol.steps import RowError

VOCAB = 5000        # no whole number of tiles
NAN, EMPTY = RowError.NAN_LOGITS, RowError.EMPTY_MASK
LAST_NOISE = 1 - 2.0**-53


# Emulated, on two threads alone: one runs the same code, and so does a level that lacks instructions for products.
PLACES = [(level, threads) for level in levels() if level is not EMULATED_BASE for threads in ((2,) if level is EMULATED else (1, 2))]


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0].name}-{place[1]} threads")
def picker(request):
    level, threads = request.param
    return KernelPicker(opened(level), threads)


@pytest.fixture
def many(request):
    """Draws enough for a statistic."""
    return 4_000 if request.getfixturevalue("picker").name.startswith("cpu kernels emulated") else 20_000


def asked(count=1, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    params = np.zeros(count, PARAMS_DTYPE)
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        params[name] = value
    return params


def logits(rows, vocab=VOCAB, scale=3.0, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def with_ties(rows, **keywords):
    return (logits(rows, **keywords) * 2).round() / 2


def tokens(picker, x, params, noise):
    """Of one row, a draw for each noise."""
    sampled = picker.random(x, np.zeros(len(noise), np.int64), np.repeat(params, len(noise)), np.asarray(noise, np.float64), NAN)
    assert not sampled.errors.any()
    return sampled.token_ids.numpy()


def torchs_weights(x, params):
    """float64 [vocab], 0 for what torch drops."""
    copy = _padded_copy(x, torch.tensor([0]))
    return _weights(copy, copy.amax(-1), params)[0, :x.shape[1]].double().numpy()


def decisive_top_p(x, params, wanted):
    """A top_p near ``wanted`` that no rounding can decide otherwise: amid the share of one token, in order."""
    weights = np.sort(torchs_weights(x, params))[::-1]
    ends = weights.cumsum() / weights.sum()
    last = int(np.searchsorted(ends, wanted))
    return float(ends[last] - weights[last] / weights.sum() / 2)


def same_set(picker, x, params):
    """How many tokens both keep; each of them is drawn by its own share of the noise."""
    weights = torchs_weights(x, params)
    middles = (weights.cumsum() - weights / 2) / weights.sum()
    wide = np.flatnonzero(weights > 2e-6 * weights.sum())
    assert np.array_equal(tokens(picker, x, params, middles[wide]), wide)
    kept = np.flatnonzero(weights)
    first, last = tokens(picker, x, params, [0.0, LAST_NOISE])
    assert first == kept[0] and weights[last] > 0
    return len(kept)


@pytest.mark.parametrize("make", [logits, with_ties])
@pytest.mark.parametrize("temperature", [1e-5, 0.3, 1.0, 2.0])
def test_temperature_alone(picker, make, temperature):
    same_set(picker, make(1), asked(temperature=temperature))


@pytest.mark.parametrize("make", [logits, with_ties])
@pytest.mark.parametrize("top_k", [1, 2, 50, 156, 160, 161, 1000, VOCAB - 1, VOCAB, 10**9])
def test_top_k(picker, make, top_k):
    """Up to 160 blocks of logits there is a bound of the k-th largest from theirs; beyond, all are looked at."""
    kept = same_set(picker, make(1), asked(top_k=top_k, temperature=1.7))
    assert kept == min(top_k, VOCAB) if make is logits else kept >= min(top_k, VOCAB)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
def test_top_p(picker, scale, top_p):
    x = logits(1, scale=scale)
    same_set(picker, x, asked(top_p=decisive_top_p(x, asked(), top_p)))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95])
def test_top_p_cuts_ties_by_lowest_id(picker, top_p):
    x = with_ties(1, scale=1.0)
    params = asked(top_p=decisive_top_p(x, asked(), top_p))
    kept = same_set(picker, x, params)
    lightest = torchs_weights(x, params)
    assert np.count_nonzero(x[0].numpy() >= x[0, lightest > 0].min().item()) > kept      # some equal ones are dropped


def test_top_p_reached_exactly_takes_no_more(picker):
    x = torch.full((1, VOCAB), -200.0)
    x[0, [10, 20, 3000, 4999]] = 0.0
    assert set(tokens(picker, x, asked(top_p=0.5), np.linspace(0, LAST_NOISE, 50)).tolist()) == {10, 20}


def test_top_p_that_drops_less_than_rounding(picker, many):
    drawn = tokens(picker, logits(1, scale=0.01), asked(top_p=1 - 1e-12), np.linspace(0, LAST_NOISE, many))
    assert len(set(drawn.tolist())) > 0.9 * min(VOCAB, many)


@pytest.mark.parametrize("min_p", [1e-6, 0.02, 0.5, 1.0])
def test_min_p(picker, min_p):
    same_set(picker, with_ties(1), asked(min_p=min_p + 1e-7 * (min_p < 1)))


@pytest.mark.parametrize("make", [logits, with_ties])
@pytest.mark.parametrize("fields", [{"top_k": 60}, {"min_p": 0.0101}, {"top_k": 300, "min_p": 0.00703}])
def test_filters_together(picker, make, fields):
    x = make(1)
    same_set(picker, x, asked(temperature=1.3, top_p=decisive_top_p(x, asked(temperature=1.3, **fields), 0.8), **fields))


@pytest.mark.parametrize("vocab", [1, 3, 8, 17, 1023, 1024, 1025])
@pytest.mark.parametrize("fields", [{}, {"top_k": 2}, {"min_p": 0.1}])
def test_any_vocabulary(picker, vocab, fields):
    same_set(picker, logits(1, vocab, scale=0.5), asked(**fields))


def test_what_is_minus_infinity_is_never_taken(picker):
    x = torch.full((1, VOCAB), float("-inf"))
    x[0, [44, 4444]] = torch.tensor([-3.0, -2.0])
    for fields in ({}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 0.01}):
        assert set(tokens(picker, x, asked(**fields), [0.0, 0.1, 0.5, LAST_NOISE]).tolist()) == {44, 4444}


def test_logits_that_are_infinite_once_scaled(picker):
    x = logits(1)
    x[0, 77] = 1e35
    for fields in ({}, {"top_k": 5}, {"top_p": 0.9}):
        assert tokens(picker, x, asked(temperature=1e-5, **fields), [0.0, LAST_NOISE]).tolist() == [77, 77]


@pytest.mark.parametrize("fields", [{}, {"top_k": 9}, {"top_p": 0.9}])
def test_rows_fail_alone(picker, fields):
    x = logits(6)
    rows, noise = np.arange(6), np.linspace(0.1, 0.9, 6)
    clean = picker.random(x, rows, asked(6, **fields), noise, EMPTY).token_ids
    x[0, 7], x[2, VOCAB - 1], x[4] = float("nan"), float("inf"), float("-inf")
    x[5, 4096] = float("nan")
    sampled = picker.random(x, rows, asked(6, **fields), noise, EMPTY)
    assert sampled.errors.tolist() == [NAN, 0, NAN, 0, EMPTY, NAN]
    assert torch.equal(sampled.token_ids[[1, 3]], clean[[1, 3]])
    assert torch.equal(sampled.errors, TorchPicker().random(x, rows, asked(6, **fields), noise, EMPTY).errors)


def test_alone_and_among_63_others(library):
    """With noise on the very edge between two tokens, where the last bit of a sum decides."""
    x, rng = logits(64, seed=3), np.random.default_rng(0)
    params = np.concatenate([asked(16), asked(16, top_k=40, top_p=0.9), asked(16, top_p=0.97), asked(16, min_p=0.001, temperature=0.7)])
    noise = np.array([(weights.cumsum() / weights.sum())[rng.choice(np.flatnonzero(weights)[:-1])] for weights in
                      (torchs_weights(x[row:row + 1], params[row:row + 1]) for row in range(64))])
    alone = [KernelPicker(library, 2).random(x[row:row + 1], np.zeros(1, np.int64), params[row:row + 1], noise[row:row + 1], NAN).token_ids.item()
             for row in range(64)]
    assert x.numel() >= SHARED_FROM
    for threads in (1, 2, 3):
        together = KernelPicker(library, threads).random(x, np.arange(64), params, noise, NAN)
        assert together.token_ids.tolist() == alone
        some = np.arange(1, 64)
        assert KernelPicker(library, threads).random(x, some, params[some], noise[some], NAN).token_ids.tolist() == [alone[i] for i in some]


def test_draws_follow_the_distribution(picker, many):
    """chi² over tokens and the rest: 40 and a few degrees of freedom, p < 1e-4 beyond 80."""
    x, noise = logits(1, scale=2.0), np.random.default_rng(5).random(many)
    for fields in ({}, {"top_k": 40}, {"top_p": 0.8}):
        weights = torchs_weights(x, asked(**fields))
        shares = weights / weights.sum()
        likely = np.argsort(-shares)[:40]
        found = np.bincount(tokens(picker, x, asked(**fields), noise), minlength=VOCAB)
        expected = np.append(shares[likely], 1 - shares[likely].sum()) * len(noise)
        seen = np.append(found[likely], found.sum() - found[likely].sum())
        real = expected > 1
        assert ((seen - expected)[real] ** 2 / expected[real]).sum() < 80 and seen[~real].sum() == 0
