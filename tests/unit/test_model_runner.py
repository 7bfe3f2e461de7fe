"""The runner on a tiny random Llama: same request, same tokens and logprobs, bit for bit; rows and
steps that fail."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from gpu_worker.kv_cache import KVCache
from gpu_worker.model_runner import ModelRunner
from gpu_worker.models.registry import load_model
from gpu_worker.models.spec import LoadedModel
from gpu_worker.request_states import RequestStates
from gpu_worker.row_buckets import RowBuckets
from protocol.codec import f32_bytes, f32_column, i32_bytes, i32_column
from protocol.sampling_params import TokenParams
from protocol.steps import Admission, RowError, StepPlan, StepResult, StepStatus
from private_cache import use_private_cache

CPU = torch.device("cpu")
ROWS, BLOCKS, BLOCK_TOKENS = 8, 40, 32
RESUMED_TOKENS = 8           # of a stream that is cut at each: over the end of a block, and more than the fewest of any
Step = tuple[int, list[tuple[str, str]]]         # token, [(id, logprob as hex)]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8", "int4"])
def model(request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    if request.param not in ("int8", "int4"):
        return load_model(tiny_llama_dir, dtype=request.param, device=CPU, num_threads=1)
    with pytest.MonkeyPatch.context() as patch:
        use_private_cache(patch, tmp_path_factory.mktemp("cache"))
        return load_model(tiny_llama_dir, dtype="auto", device=CPU, quantization=request.param, num_threads=1)


class FaultyModel:
    """A model whose forward or logits can be made to fail."""

    def __init__(self, model: LoadedModel) -> None:
        self._model, self.spec, self.picker = model, model.spec, model.picker
        self.raises: Exception | None = None
        self.nan_rows: list[int] = []             # rows of lm_head

    def forward(self, *arguments: object) -> torch.Tensor:
        if self.raises is not None:
            raise self.raises
        return self._model.forward(*arguments)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._model.compute_logits(hidden)
        logits[self.nan_rows] = float("nan")
        return logits


class Driver:
    """The core's part: rows, blocks and plans for some requests."""

    def __init__(self, model: LoadedModel) -> None:
        spec = model.spec
        kv = KVCache(spec, BLOCKS, spec.kv_dtype, CPU)
        kv.fill_with_nan()                        # what was never written is never read
        states = RequestStates(ROWS, spec.max_model_len, spec.vocab_size, BLOCKS, CPU)
        self.runner = ModelRunner(model, kv, states, RowBuckets())
        self._steps = itertools.count()
        self._computed: dict[int, int] = {}

    def admit(self, row: int, token_ids: list[int], params: TokenParams, prompt_len: int | None = None,
              num_computed: int = 0, block_ids: list[int] | None = None, seed: int = 17) -> Admission:
        """Row r has the blocks 4r ... 4r + 3, where no others are given."""
        self._computed[row] = num_computed
        blocks = [4 * row + i for i in range(4)] if block_ids is None else block_ids
        return Admission(row, i32_bytes(token_ids), prompt_len or len(token_ids), num_computed, i32_bytes(blocks), params, seed)

    def plan(self, rows: dict[int, int], admit: list[Admission] = (), restart_after: int | None = None) -> StepPlan:
        """``rows``: tokens of this step by row."""
        computed = [self._computed[row] for row in rows]
        return StepPlan(1, 1, next(self._steps), restart_after, list(admit), b"", i32_bytes(list(rows)), i32_bytes(computed),
                        i32_bytes(list(rows.values())))

    def step(self, rows: dict[int, int], admit: list[Admission] = (), restart_after: int | None = None) -> StepResult:
        result = self.runner.execute(self.plan(rows, admit, restart_after))
        if result.status is StepStatus.OK:
            for row, count in rows.items():
                self._computed[row] += count
        return result

    def generate(self, row: int, token_ids: list[int], params: TokenParams, count: int, prompt_len: int | None = None,
                 seed: int = 17) -> list[Step]:
        """``count`` tokens of one request that runs alone."""
        result = self.step({row: len(token_ids)}, [self.admit(row, token_ids, params, prompt_len, seed=seed)])
        steps = [sampled(result)[row] for row in [0]]
        while len(steps) < count:
            steps.append(sampled(self.step({row: 1}))[0])
        return steps


def sampled(result: StepResult) -> dict[int, Step]:
    """By row of the plan: the token, and all its logprobs as hex."""
    assert result.status is StepStatus.OK, result.detail
    num_out, tokens = i32_column(result.num_out), i32_column(result.token_ids)
    found = {}
    for index, row in enumerate(np.flatnonzero(num_out).tolist()):
        logprobs = []
        if result.logprobs is not None:
            shape = (len(tokens), result.logprobs.width)
            ids = i32_column(result.logprobs.ids).reshape(shape)[index]
            values = f32_column(result.logprobs.values).reshape(shape)[index]
            logprobs = [(int(i), float(v).hex()) for i, v in zip(ids, values, strict=True) if i >= 0]
        found[row] = (int(tokens[index]), logprobs)
    return found


def params(**fields: object) -> TokenParams:
    return TokenParams(**({"max_tokens": 64, "logprobs": 5} | fields))


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 257, length).tolist()


WANTED = {
    "greedy": params(temperature=0.0),
    "sampled": params(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01),
    "penalties": params(temperature=0.7, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.6),
    "min_tokens": params(temperature=1.5, min_tokens=5, eos_token_ids=i32_bytes(list(range(2, 120))), stop_token_ids=i32_bytes([200, 201])),
    "bad_words": params(temperature=1.0, bad_words_ids=i32_bytes([9, *(i for t in range(20, 250) for i in (t, t + 1))]),
                        bad_words_lengths=i32_bytes([1] + [2] * 230)),
    "bias": params(temperature=0.8, logit_bias_ids=i32_bytes([30, 31]), logit_bias_values=f32_bytes([3.0, -50.0]),
                   allowed_token_ids=i32_bytes(list(range(20, 60)))),
}
WANTED["everything"] = params(
    temperature=0.9, top_k=60, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=4,
    eos_token_ids=i32_bytes(list(range(2, 90))), bad_words_ids=WANTED["bad_words"].bad_words_ids,
    bad_words_lengths=WANTED["bad_words"].bad_words_lengths, logit_bias_ids=i32_bytes([130]), logit_bias_values=f32_bytes([4.0]))


@pytest.mark.parametrize("chunks", [[1] * 70, [32, 32, 6], [31, 33, 6], [5, 64, 1], [69, 1]])
def test_chunked_prompt_gives_the_bits_of_a_whole_one(model: LoadedModel, chunks: list[int]) -> None:
    wanted, ids = WANTED["greedy"], prompt(70)
    whole = Driver(model).generate(0, ids, wanted, 6)
    driver = Driver(model)
    admit = [driver.admit(2, ids, wanted)]
    for chunk in chunks[:-1]:
        assert not i32_column(driver.step({2: chunk}, admit).num_out).any()
        admit = []
    steps = [sampled(driver.step({2: chunks[-1]}))[0]]
    steps += [sampled(driver.step({2: 1}))[0] for _ in range(5)]
    assert steps == whole


def test_batch_gives_the_bits_of_each_request_alone(model: LoadedModel) -> None:
    requests = [(prompt(length, seed=length), wanted) for length, wanted in zip((1, 3, 31, 32, 33, 64, 90), WANTED.values(), strict=True)]
    alone = [Driver(model).generate(0, ids, wanted, 8, seed=row) for row, (ids, wanted) in enumerate(requests)]
    driver = Driver(model)
    admit = [driver.admit(row, ids, wanted, seed=row) for row, (ids, wanted) in enumerate(requests)]
    found = [[step] for _row, step in sorted(sampled(driver.step({row: len(ids) for row, (ids, _) in enumerate(requests)}, admit)).items())]
    for _ in range(7):
        for row, step in sampled(driver.step({row: 1 for row in range(len(requests))})).items():
            found[row].append(step)
    assert found == alone


def test_prefix_hit_gives_the_bits_of_a_computed_prefix(model: LoadedModel) -> None:
    ids, wanted = prompt(75), WANTED["sampled"]
    driver = Driver(model)
    alone = driver.generate(0, ids, wanted, 4)
    hit = driver.admit(5, ids, wanted, num_computed=64, block_ids=[0, 1, 39])
    assert sampled(driver.step({5: 11}, [hit]))[0] == alone[0]


def test_all_keys_are_stored_before_any_row_attends(model: LoadedModel) -> None:
    """A row reads blocks that another row of the same step writes, whichever stands first."""
    ids, wanted = prompt(75), WANTED["greedy"]
    alone = Driver(model).generate(0, ids, wanted, 1)[0]
    for reader, writer in ((0, 1), (1, 0)):
        driver = Driver(model)
        admit = [driver.admit(writer, ids, wanted, block_ids=[7, 8, 9]),
                 driver.admit(reader, ids, wanted, num_computed=64, block_ids=[7, 8, 20])]
        result = driver.step({row: 11 if row == reader else 75 for row in (0, 1)}, admit)
        assert sampled(result) == {0: alone, 1: alone}


def dirty_splits(model: LoadedModel, ids: list[int], wanted: TokenParams, whole: list[Step]) -> Iterator[tuple[int, list[Step]]]:
    """The stream taken up again at every split point, on a row that others have used before."""
    output = [token for token, _logprobs in whole]
    driver = Driver(model)
    for split in range(len(whole)):
        driver.generate(3, prompt(50, seed=99), WANTED["everything"], 2, seed=5)
        driver.generate(3, prompt(9, seed=98), WANTED["bias"], 2, seed=6)
        yield split, driver.generate(3, ids + output[:split], wanted, len(whole) - split, prompt_len=len(ids))


@pytest.mark.parametrize("name", WANTED)
def test_resumed_row_goes_on_with_the_same_bits(model: LoadedModel, name: str) -> None:
    ids = prompt(29, seed=4)
    whole = Driver(model).generate(0, ids, WANTED[name], RESUMED_TOKENS)
    for split, rest in dirty_splits(model, ids, WANTED[name], whole):
        assert rest == whole[split:], split


@pytest.mark.parametrize("split", [1, 20, 31, 32, 33, 60])
def test_resumed_inside_the_prompt(model: LoadedModel, split: int) -> None:
    """Part of the prompt was computed; the row is admitted anew on the same blocks and goes on."""
    ids, wanted = prompt(64, seed=3), WANTED["everything"]
    whole = Driver(model).generate(0, ids, wanted, 4)
    driver = Driver(model)
    driver.step({0: split}, [driver.admit(0, ids, wanted)])
    again = driver.admit(6, ids, wanted, num_computed=split, block_ids=[0, 1, 2])
    steps = [sampled(driver.step({6: 64 - split}, [again]))[0]]
    assert steps + [sampled(driver.step({6: 1}))[0] for _ in range(3)] == whole


def test_params_of_the_split_test_matter(model: LoadedModel) -> None:
    ids = prompt(29, seed=4)
    for name, wanted in WANTED.items():
        neutral = params(temperature=wanted.temperature, top_k=wanted.top_k, top_p=wanted.top_p, min_p=wanted.min_p)
        tokens, plain = (Driver(model).generate(0, ids, p, RESUMED_TOKENS) for p in (wanted, neutral))
        assert (tokens != plain) == (name not in ("greedy", "sampled")), name


def test_failed_row_fails_alone(model: LoadedModel) -> None:
    faulty = FaultyModel(model)
    driver, wanted = Driver(faulty), WANTED["greedy"]
    alone = [Driver(model).generate(0, prompt(5, seed=row), wanted, 3) for row in range(3)]
    admit = [driver.admit(row, prompt(5, seed=row), wanted) for row in range(3)]
    assert sampled(driver.step({0: 5, 1: 5, 2: 5}, admit)) == {row: alone[row][0] for row in range(3)}
    faulty.nan_rows = [1]
    result = driver.step({0: 1, 1: 1, 2: 1})
    assert i32_column(result.num_out).tolist() == [1, 0, 1]
    assert i32_column(result.row_errors).tolist() == [1, RowError.NAN_LOGITS]
    assert sampled(result) == {0: alone[0][1], 2: alone[2][1]}
    faulty.nan_rows = []
    after = driver.step({0: 1, 1: 1, 2: 1})                # a plan made before the failure was known
    assert sampled(after)[0] == alone[0][2] and sampled(after)[2] == alone[2][2]
    filler = Driver(model).generate(0, prompt(5, seed=1) + [alone[1][0][0]] * 2, wanted, 1)
    assert sampled(after)[1] == filler[0]                  # the failed row went on with its old token


def test_row_without_allowed_tokens(model: LoadedModel) -> None:
    wanted = params(allowed_token_ids=i32_bytes([4]), bad_words_ids=i32_bytes([4]), bad_words_lengths=i32_bytes([1]))
    driver = Driver(model)
    result = driver.step({0: 3, 1: 3}, [driver.admit(0, prompt(3), wanted), driver.admit(1, prompt(3), WANTED["greedy"])])
    assert i32_column(result.row_errors).tolist() == [0, RowError.EMPTY_MASK] and list(sampled(result)) == [1]


@pytest.mark.parametrize(("error", "status"), [
    (MemoryError(), StepStatus.FAILED_MEMORY), (torch.OutOfMemoryError("CUDA out of memory"), StepStatus.FAILED_MEMORY),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), StepStatus.FAILED_MEMORY),
    (RuntimeError("something else"), StepStatus.FAILED_INTERNAL), (IndexError("index"), StepStatus.FAILED_INTERNAL)])
def test_failed_step_is_skipped_until_restart(model: LoadedModel, error: Exception, status: StepStatus) -> None:
    faulty, ids, wanted = FaultyModel(model), prompt(40), WANTED["penalties"]
    whole = Driver(model).generate(0, ids, wanted, 3)
    driver = Driver(faulty)
    assert sampled(driver.step({0: 40}, [driver.admit(0, ids, wanted)]))[0] == whole[0]
    faulty.raises = error
    failed = driver.step({0: 1})
    assert failed.status is status and type(error).__name__ in failed.detail and not failed.token_ids
    faulty.raises = None
    assert driver.step({0: 1}).status is StepStatus.SKIPPED
    known = ids + [whole[0][0]]
    again = driver.admit(0, known, wanted, prompt_len=40, num_computed=40)
    assert driver.step({0: 1}, [again]).status is StepStatus.SKIPPED
    assert driver.step({0: 1}, [again], restart_after=failed.step_id + 1).status is StepStatus.SKIPPED
    assert sampled(driver.step({0: 1}, [again], restart_after=failed.step_id))[0] == whole[1]
    assert sampled(driver.step({0: 1}))[0] == whole[2]


def test_lost_accelerator_is_no_matter_of_the_step(model: LoadedModel) -> None:
    faulty = FaultyModel(model)
    faulty.raises = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    driver = Driver(faulty)
    with pytest.raises(torch.AcceleratorError):
        driver.step({0: 5}, [driver.admit(0, prompt(5), WANTED["greedy"])])


def test_restart_forgets_rows_that_it_does_not_admit(model: LoadedModel) -> None:
    faulty = FaultyModel(model)
    driver, wanted = Driver(faulty), WANTED["greedy"]
    driver.step({0: 5, 1: 5}, [driver.admit(row, prompt(5), wanted) for row in (0, 1)])
    faulty.raises = MemoryError()
    failed = driver.step({0: 1, 1: 1})
    faulty.raises = None
    assert driver.step({0: 5}, [driver.admit(0, prompt(5), wanted)], restart_after=failed.step_id).status is StepStatus.OK
    orphan = driver.step({1: 1})
    assert orphan.status is StepStatus.FAILED_BAD_PLAN and "nobody" in orphan.detail


def test_bad_plan_fails_and_runs_nothing(model: LoadedModel) -> None:
    """Each kind of bad plan stands in test_input_batch.py; here: what becomes of the step."""
    driver, wanted = Driver(model), WANTED["greedy"]
    driver.step({0: 5}, [driver.admit(0, prompt(5), wanted)])
    bad = driver.runner.execute(msgspec.structs.replace(driver.plan({0: 1}), num_tokens=i32_bytes([2])))
    assert bad.status is StepStatus.FAILED_BAD_PLAN and "num_tokens" in bad.detail
    assert driver.step({0: 1}).status is StepStatus.SKIPPED
    driver.runner.reset()
    assert driver.step({0: 5}, [driver.admit(0, prompt(5), wanted)]).status is StepStatus.OK


def test_plan_without_rows_admits(model: LoadedModel) -> None:
    driver = Driver(model)
    result = driver.step({}, [driver.admit(0, prompt(5), WANTED["greedy"])])
    assert result.status is StepStatus.OK and not result.num_out
    assert sampled(driver.step({0: 5}))


def prompt_rows(result: StepResult) -> dict[int, list[tuple[int, list[str]]]]:
    """By position: ids and values of a single request's prompt logprobs."""
    rows = result.prompt_logprobs
    start, count = i32_column(rows.start, 1)[0], i32_column(rows.count, 1)[0]
    ids = i32_column(rows.ids, count * rows.width).reshape(count, -1)
    values = f32_column(rows.values, count * rows.width).reshape(count, -1)
    ranks = i32_column(rows.ranks, count)
    return {int(start) + i: [*zip(ids[i].tolist(), [float(v).hex() for v in values[i]], strict=True), int(ranks[i])] for i in range(count)}


def test_prompt_logprobs_against_the_model(model: LoadedModel) -> None:
    """Of 90 tokens, so in two slices: equal to what sampling reports after each beginning of the prompt."""
    ids = prompt(90, seed=8)
    driver = Driver(model)
    found = prompt_rows(driver.step({0: 90}, [driver.admit(0, ids, params(temperature=0.0, prompt_logprobs=3))]))
    assert list(found) == list(range(1, 90))
    for position in (1, 2, 40, 64, 65, 89):
        only = params(allowed_token_ids=i32_bytes([ids[position]]), logprobs=3)
        _token, logprobs = Driver(model).generate(0, ids[:position], only, 1)[0]
        assert found[position][:-1] == logprobs, position
        better = [i for i, _v in logprobs[1:]]
        if ids[position] in better:
            assert found[position][-1] == 1 + better.index(ids[position])
        else:
            assert found[position][-1] > 3


def test_prompt_logprobs_in_chunks_and_of_resumed_rows(model: LoadedModel) -> None:
    ids, wanted = prompt(40, seed=9), params(temperature=0.0, prompt_logprobs=2)
    driver = Driver(model)
    first = driver.step({0: 40}, [driver.admit(0, ids, wanted)])
    whole, token = prompt_rows(first), sampled(first)[0][0]
    found, admit = {}, [driver.admit(1, ids + [token], wanted, prompt_len=40)]
    for chunk in (7, 30, 2):
        found |= prompt_rows(driver.step({1: chunk}, admit))
        admit = []
    assert found == whole
    assert driver.step({1: 2}).prompt_logprobs is None      # the last prompt token and the output


def test_logprob_rows_of_a_batch_that_asks_differently(model: LoadedModel) -> None:
    driver = Driver(model)
    wanted = [params(logprobs=None), params(logprobs=0), params(logprobs=4, prompt_logprobs=1)]
    result = driver.step({row: 6 for row in range(3)}, [driver.admit(row, prompt(6, row), p) for row, p in enumerate(wanted)])
    assert [len(logprobs) for _token, logprobs in sampled(result).values()] == [0, 1, 5]
    assert result.logprobs.width == 5 and i32_column(result.logprobs.ranks)[0] == 0
    assert i32_column(result.prompt_logprobs.batch_idx).tolist() == [2] and len(prompt_rows(result)) == 5
    for token, logprobs in list(sampled(result).values())[1:]:
        assert logprobs[0][0] == token
    values = [float.fromhex(v) for _i, v in sampled(result)[2][1][1:]]
    assert values == sorted(values, reverse=True)
