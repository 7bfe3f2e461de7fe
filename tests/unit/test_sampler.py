"""Every sampling parameter against a slow reference that walks one row token by token."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from gpu_worker.filters import draw
from gpu_worker.logit_changes import SamplingRows
from gpu_worker.models.cpu_kernels import CpuKernels
from gpu_worker.noise import hash64, uniforms
from gpu_worker.picking import Picker, Sampled, TorchPicker
from gpu_worker.request_states import PARAMS_DTYPE, RequestStates, TokenLists
from gpu_worker.sampler import sample as sample_by
from protocol.codec import f32_bytes, i32_bytes
from protocol.sampling_params import TokenParams
from protocol.steps import Admission, RowError

VOCAB = 1500        # no whole number of tiles
MAX_LEN = 64
CPU = torch.device("cpu")
Sample = Callable[[torch.Tensor, SamplingRows], Sampled]


@pytest.fixture(params=["torch", "kernels"])
def sample(request: pytest.FixtureRequest) -> Sample:
    picker: Picker = TorchPicker()
    if request.param == "kernels":
        kernels, reason = CpuKernels.open(CPU, num_threads=2)
        if kernels is None:
            pytest.skip(reason or "switched off")
        picker = kernels.picker
    return lambda logits, rows: sample_by(logits, rows, picker)


def params(**fields: object) -> TokenParams:
    """TokenParams; lists are given as lists, bad words as lists of ids."""
    words = fields.pop("bad_words", [])
    bias = fields.pop("logit_bias", {})
    for name in ("stop_token_ids", "allowed_token_ids", "eos_token_ids"):
        if name in fields:
            fields[name] = i32_bytes(fields[name])
    return TokenParams(
        max_tokens=32, bad_words_ids=i32_bytes([i for word in words for i in word]), bad_words_lengths=i32_bytes([len(w) for w in words]),
        logit_bias_ids=i32_bytes(list(bias)), logit_bias_values=f32_bytes(list(bias.values())), **fields)


def rows_of(requests: list[tuple[TokenParams, list[int], int, int]], vocab: int = VOCAB) -> SamplingRows:
    """Rows for (params, token_ids, prompt_len, seed), through admission."""
    states = RequestStates(len(requests), MAX_LEN, vocab, 4, CPU)
    for row, (wanted, token_ids, prompt_len, seed) in enumerate(requests):
        admission = Admission(row, i32_bytes(token_ids), prompt_len, 0, b"", wanted, seed)
        states.admit(admission, TokenLists.of(wanted))
    req_idx = np.arange(len(requests))
    return SamplingRows(req_idx, states.num_tokens.copy(), states.prompt_len.copy(), states.params.copy(), list(states.lists), states.token_ids)


def slow_logits(logits: np.ndarray, wanted: TokenParams, token_ids: list[int], prompt_len: int) -> np.ndarray:
    """Masks, bias and penalties of one row, in float32."""
    x, lists, output = logits.astype(np.float32).copy(), TokenLists.of(wanted), token_ids[prompt_len:]
    if lists.allowed is not None:
        x[[i for i in range(len(x)) if i not in set(lists.allowed.tolist())]] = -np.inf
    begin = 0
    for length in lists.bad_lengths.tolist():
        word = np.frombuffer(wanted.bad_words_ids, "<i4")[begin:begin + length].tolist()
        begin += length
        if length - 1 <= len(output) and output[len(output) - length + 1:] == word[:-1]:
            x[word[-1]] = -np.inf
    if len(output) < wanted.min_tokens:
        x[lists.end_ids] = -np.inf
    for token, value in zip(lists.bias_ids.tolist(), lists.bias_values.tolist(), strict=True):
        x[token] += np.float32(value)
    penalty = np.float32(wanted.repetition_penalty)
    for token in set(token_ids):
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(output):
        x[token] -= np.float32(wanted.frequency_penalty) * np.float32(output.count(token))
        x[token] -= np.float32(wanted.presence_penalty)
    return x


def slow_kept(x: np.ndarray, wanted: TokenParams) -> tuple[np.ndarray, np.ndarray]:
    """(ids that stay, ascending; their weights)."""
    scaled = torch.from_numpy(x) / np.float32(wanted.temperature)
    weights = (scaled - scaled.max()).exp().numpy()
    kept = [i for i in range(len(x)) if weights[i] > 0 and weights[i] >= np.float32(wanted.min_p)]
    if 0 < wanted.top_k < len(kept):
        least = sorted((scaled[i].item() for i in kept), reverse=True)[wanted.top_k - 1]
        kept = [i for i in kept if scaled[i].item() >= least]
    if wanted.top_p < 1.0:
        total = sum(float(weights[i]) for i in kept)
        by_share, share, chosen = sorted(kept, key=lambda i: (-weights[i], i)), 0.0, []
        for token in by_share:
            chosen.append(token)
            share += float(weights[token])
            if share >= wanted.top_p * total:
                break
        kept = sorted(chosen)
    return np.array(kept), weights[kept]


def slow_sample(logits: np.ndarray, wanted: TokenParams, token_ids: list[int], prompt_len: int, seed: int) -> int:
    x = slow_logits(logits, wanted, token_ids, prompt_len)
    if wanted.greedy:
        return int(np.flatnonzero(x == x.max())[0])
    kept, weights = slow_kept(x, wanted)
    noise = uniforms(np.array([seed], np.uint64), np.array([len(token_ids)]))[0]
    target, total = noise * math.fsum(weights.tolist()), 0.0
    for token, weight in zip(kept.tolist(), weights.tolist(), strict=True):
        total += weight
        if total > target:
            return token
    return int(kept[-1])


CASES = {
    "greedy": params(temperature=0.0),
    "almost zero temperature": params(temperature=9e-6),
    "lowest temperature": params(temperature=1e-5),
    "plain": params(),
    "cold": params(temperature=0.3),
    "hot": params(temperature=2.0),
    "top_k": params(top_k=7),
    "top_k 1": params(top_k=1),
    "top_k beyond the vocabulary": params(top_k=10**9),
    "top_p": params(top_p=0.6),
    "small top_p": params(top_p=1e-9),
    "large top_p": params(top_p=0.999999),
    "min_p": params(min_p=0.05),
    "min_p 1": params(min_p=1.0),
    "all filters": params(temperature=1.3, top_k=40, top_p=0.8, min_p=0.02),
    "repetition penalty": params(repetition_penalty=1.7),
    "repetition reward": params(repetition_penalty=0.4),
    "presence penalty": params(presence_penalty=1.5),
    "frequency penalty": params(frequency_penalty=-1.1),
    "penalties, greedy": params(temperature=0.0, repetition_penalty=1.9, presence_penalty=2.0, frequency_penalty=2.0),
    "logit_bias": params(logit_bias={3: 4.0, 700: -100.0, 1499: 5.0}),
    "logit_bias, greedy": params(temperature=0.0, logit_bias={11: 100.0}),
    "allowed_token_ids": params(allowed_token_ids=[0, 12, 1023, 1024, 1499]),
    "allowed_token_ids, greedy": params(temperature=0.0, allowed_token_ids=[9, 4, 800]),
    "bad_words": params(bad_words=[[5], [8, 13], [21, 8, 14], [9, 9, 9, 15]], temperature=0.5),
    "min_tokens": params(min_tokens=6, eos_token_ids=[2, 40], stop_token_ids=[41], temperature=0.5),
    "everything": params(
        temperature=0.8, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2,
        logit_bias={8: 6.0, 9: -3.0}, allowed_token_ids=list(range(900)), bad_words=[[8], [8, 9]], min_tokens=20, eos_token_ids=[2]),
}
PROMPT = [8, 21, 3, 3, 700]
OUTPUT = [9, 21, 8, 9, 9]


def some_logits(count: int, seed: int, vocab: int = VOCAB) -> torch.Tensor:
    """Mostly low, with a few dozen candidates, some of them exactly equal, and the tokens that params name among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocab, generator=generator) * 2 - 6
    logits[:, :48] += 6
    logits[:, 30:34] = logits[:, 30:31]
    logits[:, [700, 1023, 1024, 1499]] += 6
    return logits


@pytest.mark.parametrize("name", CASES)
def test_parameter_against_slow_reference(sample: Sample, name: str) -> None:
    wanted, count = CASES[name], 24
    requests = [(wanted, PROMPT + OUTPUT[:i % 6], len(PROMPT), 1000 + i) for i in range(count)]
    logits = some_logits(count, seed=len(name))
    sampled = sample(logits, rows_of(requests))
    assert not sampled.errors.any()
    expected = [slow_sample(logits[i].numpy(), *request) for i, request in enumerate(requests)]
    assert sampled.token_ids.tolist() == expected


def test_parameters_change_what_is_sampled(sample: Sample) -> None:
    """The reference above would agree with a sampler that ignores a parameter which never matters."""
    logits = some_logits(64, seed=5)
    plain = sample(logits, rows_of([(params(), PROMPT + OUTPUT, 5, i) for i in range(64)])).token_ids
    greedy = sample(logits, rows_of([(params(temperature=0.0), PROMPT + OUTPUT, 5, i) for i in range(64)])).token_ids
    for name, wanted in CASES.items():
        same = greedy if wanted.greedy else plain
        differs = sample(logits, rows_of([(wanted, PROMPT + OUTPUT, 5, i) for i in range(64)])).token_ids != same
        neutral = name in ("greedy", "almost zero temperature", "plain", "top_k beyond the vocabulary", "large top_p")
        assert bool(differs.any()) != neutral, name


def test_mixed_batch_is_bit_equal_to_each_row_alone(sample: Sample) -> None:
    requests = [(wanted, PROMPT + OUTPUT[:i % 6], len(PROMPT), i) for i, wanted in enumerate(list(CASES.values()) * 3)]
    logits = some_logits(len(requests) + 3, seed=7)        # three rows of padding
    together = sample(logits, rows_of(requests)).token_ids.tolist()
    alone = [sample(logits[i:i + 1], rows_of([request])).token_ids.item() for i, request in enumerate(requests)]
    assert together == alone
    assert together == [slow_sample(logits[i].numpy(), *request) for i, request in enumerate(requests)]


def test_logits_are_not_changed(sample: Sample) -> None:
    logits = some_logits(len(CASES), seed=1)
    before = logits.clone()
    sample(logits, rows_of([(wanted, PROMPT, 5, 0) for wanted in CASES.values()]))
    assert torch.equal(logits, before)


def test_greedy_takes_the_lowest_of_equal_ids(sample: Sample) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, [77, 1200]] = 1.0
    wanted = [params(temperature=0.0), params(temperature=0.0), params(temperature=0.0, logit_bias={0: -1.0})]
    assert sample(logits, rows_of([(w, [1], 1, 0) for w in wanted])).token_ids.tolist() == [0, 77, 1]


def test_top_k_keeps_ties_at_its_threshold(sample: Sample) -> None:
    logits = torch.full((400, VOCAB), -20.0)
    logits[:, [3, 600, 1400]] = 1.0
    logits[:, 9] = 2.0
    drawn = sample(logits, rows_of([(params(top_k=2, temperature=2.0), [1], 1, seed) for seed in range(400)])).token_ids
    assert set(drawn.tolist()) == {3, 9, 600, 1400}


def test_top_p_cuts_ties_by_lowest_id(sample: Sample) -> None:
    logits = torch.zeros(600, VOCAB)         # all equal: 0.1 of them are the ids 0 ... 149, more than are sorted at first with 0.2
    for top_p, size in ((0.1, 150), (0.2, 300), (0.9, 1350)):
        drawn = sample(logits, rows_of([(params(top_p=top_p), [1], 1, seed) for seed in range(600)])).token_ids
        assert int(drawn.max()) < size and len(set(drawn.tolist())) > size // 4


def test_top_p_reached_exactly_takes_no_more(sample: Sample) -> None:
    logits = torch.full((200, VOCAB), -200.0)
    logits[:, [10, 20, 30, 40]] = 0.0
    drawn = sample(logits, rows_of([(params(top_p=0.5), [1], 1, seed) for seed in range(200)])).token_ids
    assert set(drawn.tolist()) == {10, 20}


def test_failed_rows_fail_alone(sample: Sample) -> None:
    logits = some_logits(7, seed=3)
    clean = logits.clone()
    logits[0, 5], logits[2, 1499], logits[3] = float("nan"), float("inf"), float("-inf")
    wanted = [params(temperature=0.0), params(), params(), params(temperature=0.0),
              params(allowed_token_ids=[4], bad_words=[[4]]), params(allowed_token_ids=[2], min_tokens=3, eos_token_ids=[2], temperature=0.0),
              params(top_p=0.5)]
    requests = [(w, [1, 2], 2, i) for i, w in enumerate(wanted)]
    sampled = sample(logits, rows_of(requests))
    nan, empty = int(RowError.NAN_LOGITS), int(RowError.EMPTY_MASK)
    assert sampled.errors.tolist() == [nan, 0, nan, nan, empty, empty, 0]
    undisturbed = sample(clean, rows_of(requests)).token_ids
    assert sampled.token_ids[[1, 6]].tolist() == undisturbed[[1, 6]].tolist()


def test_logits_of_minus_infinity_are_no_error(sample: Sample) -> None:
    logits = torch.full((2, VOCAB), float("-inf"))
    logits[:, 44] = -3.0
    sampled = sample(logits, rows_of([(params(temperature=0.0), [1], 1, 0), (params(), [1], 1, 0)]))
    assert sampled.errors.tolist() == [0, 0] and sampled.token_ids.tolist() == [44, 44]


def test_draw_at_the_ends_of_the_noise() -> None:
    weights = torch.zeros(4, 2048)
    weights[:, [7, 1023, 1024, 2000]] = torch.tensor([0.25, 0.25, 0.25, 0.25])
    noise = torch.tensor([0.0, 0.25, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    assert draw(weights, noise).tolist() == [7, 1023, 2000, 1024]


def test_draw_where_rounding_leaves_nothing_above_the_target() -> None:
    """The sum of a tile and the running sum inside it round differently; the last id of any weight is taken."""
    weights = torch.zeros(500, 2048)
    weights[:, 3:900] = torch.rand(500, 897, generator=torch.Generator().manual_seed(0))
    drawn = draw(weights, torch.full((500,), 1 - 2.0**-53, dtype=torch.float64))
    assert drawn.tolist().count(899) > 450 and int(drawn.min()) > 890


def test_bad_words_look_at_the_output_alone(sample: Sample) -> None:
    wanted = params(temperature=0.0, bad_words=[[5, 6, 7]])
    logits = torch.zeros(4, VOCAB)
    logits[:, 7] = 1.0
    sequences = [([1, 5, 6], 1), ([1, 5, 6], 2), ([5, 6], 2), ([1, 6], 1)]      # (tokens, prompt_len)
    found = sample(logits, rows_of([(wanted, token_ids, prompt_len, 0) for token_ids, prompt_len in sequences])).token_ids
    assert found.tolist() == [0, 7, 7, 7]


def test_min_tokens_ends_at_its_number(sample: Sample) -> None:
    wanted = params(temperature=0.0, min_tokens=3, eos_token_ids=[9], stop_token_ids=[8])
    logits = torch.zeros(5, VOCAB)
    logits[:, 9], logits[:, 8] = 2.0, 1.0
    found = sample(logits, rows_of([(wanted, [1, 1] + [5] * n, 2, 0) for n in range(5)])).token_ids
    assert found.tolist() == [0, 0, 0, 9, 9]


def test_noise_is_uniform_and_independent_of_neighbours() -> None:
    seeds, positions = np.repeat(np.arange(300, dtype=np.uint64), 300), np.tile(np.arange(300), 300)
    values = uniforms(seeds, positions)
    assert 0.0 <= values.min() and values.max() < 1.0
    counts = np.histogram(values, 100, (0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 160                    # chi², 99 degrees of freedom: p < 1e-4 beyond
    grid = values.reshape(300, 300)
    for neighbour in (grid[1:, :] * 1.0 - grid[:-1, :], grid[:, 1:] - grid[:, :-1], grid[1:, :-1] - grid[:-1, 1:]):
        assert abs(neighbour.var() - 1 / 6) < 0.003                   # of two independent uniforms
    assert len(np.unique(hash64(seeds, positions))) == len(seeds)


def test_noise_takes_seeds_of_64_bits() -> None:
    seeds = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert len(set(hash64(seeds, np.zeros(4, np.int64)).tolist())) == 4


def test_draws_follow_the_distribution(sample: Sample) -> None:
    count = 20_000
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = torch.full((1, 64), -60.0)
    logits[0, 10:15] = torch.from_numpy(np.log(probabilities)).float()
    found = np.zeros(64)
    requests = [(params(), [1] * (1 + i % 20), 1, i // 20) for i in range(count)]
    drawn = sample(logits.expand(count, 64), rows_of(requests, vocab=64)).token_ids.numpy()
    np.add.at(found, drawn, 1)
    assert found[10:15].sum() == count
    assert (((found[10:15] - count * probabilities) ** 2) / (count * probabilities)).sum() < 23   # chi², 4 degrees: p < 1e-4


def test_every_column_of_params_is_written() -> None:
    """An admission inherits nothing: a dirty row and a fresh one end equal."""
    clean = rows_of([(CASES["plain"], [5], 1, 3)])
    states = RequestStates(1, MAX_LEN, VOCAB, 4, CPU)
    for wanted, token_ids, seed in ((CASES["everything"], PROMPT + OUTPUT, 2**64 - 1), (CASES["plain"], [5], 3)):
        states.admit(Admission(0, i32_bytes(token_ids), 1, 0, i32_bytes([3, 2]), wanted, seed), TokenLists.of(wanted))
    for name in PARAMS_DTYPE.names:
        assert states.params[name] == clean.params[name], name
