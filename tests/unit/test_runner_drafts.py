"""Drafts in the worker: whatever is guessed, the tokens and logprobs are those of single steps, bit for bit."""

import msgspec
import numpy as np
import pytest

from gpu_worker.models.spec import LoadedModel
from protocol.codec import i32_bytes, i32_column
from protocol.steps import RowError, StepPlan, StepResult, StepStatus
from test_model_runner import WANTED, Driver, FaultyModel, Step, model, params, prompt  # noqa: F401  (model: a fixture)
from test_runner_steps import tokens_of

PROMPTS = (1, 3, 27, 30, 33, 61, 90)       # tokens


def draft_plan(driver: Driver, drafts: dict[int, list[int]], others: dict[int, int] | None = None, admit: list = ()) -> StepPlan:
    """Rows that decode behind their drafts (perhaps none), then ``others`` with so many tokens each."""
    others = others or {}
    plan = driver.plan({row: 1 + len(ids) for row, ids in drafts.items()} | others, admit)
    counts = [len(ids) for ids in drafts.values()] + [0] * len(others)
    return msgspec.structs.replace(plan, num_drafts=i32_bytes(counts), drafts=i32_bytes([i for ids in drafts.values() for i in ids]))


def run(driver: Driver, plan: StepPlan) -> StepResult:
    result = driver.runner.execute(plan)
    assert result.status is StepStatus.OK, result.detail
    num_out, num_drafts = i32_column(result.num_out), i32_column(plan.num_drafts)
    for row, count, drafts, out in zip(i32_column(plan.rows).tolist(), i32_column(plan.num_tokens), num_drafts, num_out, strict=True):
        driver._computed[row] += int(count - drafts + max(out - 1, 0))      # what apply takes off
    return result


def guesses(rng: np.random.Generator, following: list[int], vocab_size: int) -> list[int]:
    """Right for a while, then perhaps not."""
    count = int(rng.integers(0, 6))
    ids = (following + [5] * count)[:count]
    return [i if rng.random() < 0.75 else int(rng.integers(3, vocab_size)) for i in ids]


@pytest.mark.parametrize("seed", range(3))
def test_any_guess_gives_the_bits_of_single_steps(model: LoadedModel, seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = [(prompt(length, seed=length), wanted) for length, wanted in zip(PROMPTS, WANTED.values(), strict=True)]
    alone = [Driver(model).generate(0, ids, wanted, 16, seed=row) for row, (ids, wanted) in enumerate(requests)]
    driver = Driver(model)
    admit = [driver.admit(row, ids, wanted, seed=row) for row, (ids, wanted) in enumerate(requests)]
    found = tokens_of(driver.step({row: len(ids) for row, (ids, _) in enumerate(requests)}, admit))
    num_accepted = 0
    while any(len(steps) < 8 for steps in found):
        drafts = {}
        for row, steps in enumerate(found):
            if len(steps) < 8:
                drafts[row] = guesses(rng, [token for token, _ in alone[row][len(steps):]], model.spec.vocab_size)
        for row, steps in zip(drafts, tokens_of(run(driver, draft_plan(driver, drafts))), strict=True):
            found[row] += steps
            num_accepted += len(steps) - 1
        states = driver.runner.states
        assert [len(ids) + len(steps) for (ids, _), steps in zip(requests, found, strict=True)] == states.num_tokens[:7].tolist()
        assert (states.num_tokens[:7] - states.num_computed[:7]).tolist() == [1] * 7
    assert found == [steps[:len(own)] for own, steps in zip(found, alone, strict=True)]
    assert num_accepted > 10


@pytest.mark.parametrize("name", WANTED)
def test_right_drafts_are_all_accepted_and_a_wrong_one_ends_them(model: LoadedModel, name: str) -> None:
    ids, wanted = prompt(29, seed=4), WANTED[name]
    alone = Driver(model).generate(0, ids, wanted, 14)
    tokens = [token for token, _ in alone]
    for wrong_at in (0, 2, 5, None):
        driver = Driver(model)
        driver.step({3: 29}, [driver.admit(3, ids, wanted)])
        drafts = tokens[1:7]
        if wrong_at is not None:
            drafts[wrong_at] = (drafts[wrong_at] + 1) % model.spec.vocab_size
        first, = tokens_of(run(driver, draft_plan(driver, {3: drafts})))
        assert first == alone[1:2 + (6 if wrong_at is None else wrong_at)]
        rest = [steps for _ in range(4) for steps in tokens_of(driver.step({3: 1}))[0]]
        assert rest == alone[1 + len(first):5 + len(first)]


def test_drafts_beside_chunks_and_plain_decodes(model: LoadedModel) -> None:
    ids = [prompt(n, seed=n) for n in (20, 31, 70)]
    alone = [Driver(model).generate(0, own, WANTED["sampled"], 8) for own in ids]
    driver = Driver(model)
    driver.step({0: 20, 1: 31}, [driver.admit(row, ids[row], WANTED["sampled"]) for row in (0, 1)])
    drafts = {0: [token for token, _ in alone[0][1:4]], 1: []}
    plan = draft_plan(driver, drafts, {2: 40}, [driver.admit(2, ids[2], WANTED["sampled"])])
    first, second, third = tokens_of(run(driver, plan))
    assert (first, second, third) == (alone[0][1:5], alone[1][1:2], [])
    first, second, third = tokens_of(run(driver, draft_plan(driver, {0: [4, 4], 1: [alone[1][2][0]]}, {2: 30})))
    assert (first, second, third) == (alone[0][5:6], alone[1][2:4], alone[2][:1])


def test_accepted_drafts_are_in_the_cache_as_tokens_are(model: LoadedModel) -> None:
    """Another request that finds these blocks goes on with the same bits."""
    ids, wanted = prompt(29, seed=4), WANTED["greedy"]
    alone = Driver(model).generate(0, ids, wanted, 40)
    tokens = [token for token, _ in alone]
    driver = Driver(model)
    driver.step({0: 29}, [driver.admit(0, ids, wanted)])
    run(driver, draft_plan(driver, {0: tokens[1:9]}))
    hit = driver.admit(5, ids + tokens[:9], wanted, prompt_len=29, num_computed=32, block_ids=[0, 30, 31])
    steps = tokens_of(driver.step({5: 6}, [hit]))[0]
    assert steps + [step for _ in range(3) for step in tokens_of(driver.step({5: 1}))[0]] == alone[9:13]


@pytest.mark.parametrize(("nan_row", "num_drafts_right", "kept"), [(0, 3, 0), (2, 3, 2), (3, 3, 3), (3, 1, 2), (2, 1, 2)])
def test_an_error_behind_a_draft(model: LoadedModel, nan_row: int, num_drafts_right: int, kept: int) -> None:
    """It counts only where everything before it was right; the tokens before it do."""
    ids, wanted = prompt(12), params(temperature=0.0)
    alone = Driver(model).generate(0, ids, wanted, 6)
    tokens = [token for token, _ in alone]
    faulty = FaultyModel(model)
    driver = Driver(faulty)
    driver.step({0: 12}, [driver.admit(0, ids, wanted)])
    drafts = [token if i < num_drafts_right else (token + 1) % 250 for i, token in enumerate(tokens[1:4])]
    faulty.nan_rows = [nan_row]
    result = run(driver, draft_plan(driver, {0: drafts}))
    failed = nan_row <= num_drafts_right
    assert tokens_of(result)[0] == alone[1:1 + kept]
    assert i32_column(result.row_errors).tolist() == ([0, RowError.NAN_LOGITS] if failed else [])
    states = driver.runner.states
    assert states.num_tokens[0] == 13 + kept + failed and states.num_computed[0] == states.num_tokens[0] - 1


def steps_of(found: list[Step]) -> list[int]:
    return [token for token, _ in found]


def test_prompt_logprobs_are_not_disturbed(model: LoadedModel) -> None:
    ids, wanted = prompt(12), params(temperature=0.0, prompt_logprobs=2)
    driver = Driver(model)
    driver.step({0: 11}, [driver.admit(0, ids, wanted)])
    result = run(driver, draft_plan(driver, {0: [7, 8]}))       # the prompt's last token, and guesses behind it
    assert result.prompt_logprobs is None
    assert steps_of(tokens_of(result)[0])[:1] == steps_of(Driver(model).generate(0, ids, wanted, 1))


@pytest.mark.parametrize(("fields", "text"), [
    ({"num_steps": 2}, "drafts: in a plan of several steps"),
    ({"drafts": i32_bytes([257, 5])}, "drafts: a token id is not in"),
    ({"drafts": i32_bytes([-1, 5])}, "drafts: a token id is not in"),
    ({"num_drafts": i32_bytes([2])}, "num_drafts: 1 values, expected 2"),
    ({"num_drafts": i32_bytes([2, 0])}, "num_tokens: more than the row's known tokens"),
    ({"num_tokens": i32_bytes([2, 1])}, "drafts: of a row that does not decode"),
    ({"num_drafts": None, "drafts": None}, "num_tokens: more than the row's known tokens"),
])
def test_plans_that_contradict_the_tables(model: LoadedModel, fields: dict, text: str) -> None:
    driver = Driver(model)
    driver.step({0: 9, 1: 9}, [driver.admit(row, prompt(9), params()) for row in range(2)])
    good = draft_plan(driver, {0: [5], 1: [6]})
    result = driver.runner.execute(msgspec.structs.replace(good, **fields))
    assert result.status is StepStatus.FAILED_BAD_PLAN and text in result.detail


def test_drafts_beyond_blocks_and_model_length(model: LoadedModel) -> None:
    for blocks, length, text in (([0], 31, "beyond the row's blocks"), ([0, 1, 2, 3], 125, "beyond max_model_len")):
        driver = Driver(model)
        driver.step({0: length}, [driver.admit(0, prompt(length), params(), block_ids=blocks)])
        result = driver.runner.execute(draft_plan(driver, {0: [5, 6]}))
        assert result.status is StepStatus.FAILED_BAD_PLAN and text in result.detail
