"""Plans of several decode steps, run by the worker on a tiny random Llama."""

import numpy as np
import pytest

from gpu_worker.models.spec import LoadedModel
from protocol.codec import f32_column, i32_bytes, i32_column
from protocol.steps import RowError, StepPlan, StepResult, StepStatus
from test_model_runner import WANTED, Driver, FaultyModel, Step, model, params, prompt  # noqa: F401  (model: a fixture)


def many(driver: Driver, rows: list[int], num_steps: int) -> StepResult:
    """A plan that decodes ``rows`` several times over."""
    plan = driver.plan(dict.fromkeys(rows, 1))
    result = driver.runner.execute(StepPlan(**{f: getattr(plan, f) for f in plan.__struct_fields__} | {"num_steps": num_steps}))
    if result.status is StepStatus.OK:
        for row in rows:
            driver._computed[row] += num_steps
    return result


def tokens_of(result: StepResult) -> list[list[Step]]:
    """By row of the plan: its tokens, and all their logprobs as hex."""
    assert result.status is StepStatus.OK, result.detail
    tokens, at, found = i32_column(result.token_ids).tolist(), 0, []
    rows = result.logprobs
    ids = values = None
    if rows is not None:
        ids = i32_column(rows.ids).reshape(len(tokens), rows.width).tolist()
        values = f32_column(rows.values).reshape(len(tokens), rows.width).tolist()
    for count in i32_column(result.num_out).tolist():
        steps = []
        for i in range(at, at + count):
            pairs = [] if rows is None else [(j, float(v).hex()) for j, v in zip(ids[i], values[i], strict=True) if j >= 0]
            steps.append((tokens[i], pairs))
        found.append(steps)
        at += count
    assert at == len(tokens)
    return found


@pytest.mark.parametrize("num_steps", [2, 4, 5])
def test_several_steps_give_the_bits_of_single_ones(model: LoadedModel, num_steps: int) -> None:
    requests = [(prompt(length, seed=length), wanted) for length, wanted in zip((1, 3, 27, 30, 33, 61, 90), WANTED.values(), strict=True)]
    alone = [Driver(model).generate(0, ids, wanted, 11, seed=row) for row, (ids, wanted) in enumerate(requests)]
    driver = Driver(model)
    admit = [driver.admit(row, ids, wanted, seed=row) for row, (ids, wanted) in enumerate(requests)]
    found = tokens_of(driver.step({row: len(ids) for row, (ids, _) in enumerate(requests)}, admit))
    for _ in range(10 // num_steps):
        for row, steps in enumerate(tokens_of(many(driver, list(range(len(requests))), num_steps))):
            found[row] += steps
    assert found == [steps[:1 + 10 // num_steps * num_steps] for steps in alone]


def test_single_steps_go_on_after_several(model: LoadedModel) -> None:
    alone = Driver(model).generate(0, prompt(20), WANTED["everything"], 9)
    driver = Driver(model)
    found = tokens_of(driver.step({0: 20}, [driver.admit(0, prompt(20), WANTED["everything"])]))[0]
    for num_steps in (3, 1, 4):
        found += tokens_of(many(driver, [0], num_steps))[0]
    assert found == alone


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_row_that_fails_within_keeps_its_tokens_and_its_length(model: LoadedModel, fails_at: int) -> None:
    """The other rows are not disturbed, and the next plan, which is under way already, finds what it counts on."""
    alone = [Driver(model).generate(0, prompt(9, seed), params(temperature=0.0), 9) for seed in range(2)]
    faulty = FaultyModel(model)
    driver = Driver(faulty)
    found = tokens_of(driver.step({0: 9, 1: 9}, [driver.admit(row, prompt(9, row), params(temperature=0.0)) for row in range(2)]))
    logits, calls = faulty.compute_logits, []

    def failing_once(hidden):
        faulty.nan_rows = [0] if len(calls) == fails_at else []
        calls.append(1)
        return logits(hidden)

    faulty.compute_logits = failing_once
    result = many(driver, [0, 1], 4)
    assert i32_column(result.num_out).tolist() == [fails_at, 4]
    assert i32_column(result.row_errors).tolist() == [0, RowError.NAN_LOGITS]
    steps = tokens_of(result)
    assert found[0] + steps[0] == alone[0][:1 + fails_at]
    again = many(driver, [0, 1], 4)
    assert again.status is StepStatus.OK
    assert found[1] + steps[1] + tokens_of(again)[1] == alone[1]
    states = driver.runner.states
    assert states.num_tokens[:2].tolist() == [18, 18] and states.num_computed[:2].tolist() == [17, 17]
    assert (0 <= states.token_ids[:2, :18]).all() and (states.token_ids[:2, :18] < states.vocab_size).all()


def test_all_rows_may_fail(model: LoadedModel) -> None:
    faulty = FaultyModel(model)
    driver = Driver(faulty)
    driver.step({0: 4, 1: 4}, [driver.admit(row, prompt(4, row), params()) for row in range(2)])
    faulty.nan_rows = [0, 1]
    result = many(driver, [0, 1], 3)
    assert i32_column(result.num_out).tolist() == [0, 0] and not result.token_ids and result.logprobs is None
    assert i32_column(result.row_errors).reshape(-1, 2).tolist() == [[0, RowError.NAN_LOGITS], [1, RowError.NAN_LOGITS]]


def test_timings_cover_all_steps(model: LoadedModel) -> None:
    driver = Driver(model)
    driver.step({0: 4}, [driver.admit(0, prompt(4), params())])
    build, forward, sampling, total = i32_column(many(driver, [0], 8).timings_us).tolist()
    assert min(build, forward, sampling) > 0 and 0.5 * total < build + forward + sampling <= total


@pytest.mark.parametrize(("rows", "num_steps", "text"), [
    ({0: 1}, 0, "num_steps: 0"), ({0: 1}, -1, "num_steps: -1"), ({0: 1}, 10**6, "num_steps: 1000000"),
    ({1: 2}, 2, "of a row that does not decode"), ({1: 1}, 2, "of a row that does not decode"),
    ({0: 1}, 128 - 32, "max_model_len"), ({2: 1}, 2, "beyond the row's blocks")])
def test_plans_that_contradict_the_tables(model: LoadedModel, rows: dict[int, int], num_steps: int, text: str) -> None:
    """Row 0 has 33 tokens in four blocks; row 1 a prompt half computed; row 2 one position left in its block."""
    driver = Driver(model)
    admit = [driver.admit(0, prompt(32), params()), driver.admit(1, prompt(9), params()), driver.admit(2, prompt(31), params(), block_ids=[39])]
    assert driver.step({0: 32, 1: 4, 2: 31}, admit).status is StepStatus.OK
    plan = driver.plan(rows)
    plan = StepPlan(**{f: getattr(plan, f) for f in plan.__struct_fields__} | {"num_steps": num_steps})
    result = driver.runner.execute(plan)
    assert result.status is StepStatus.FAILED_BAD_PLAN and text in result.detail


def test_positions_of_all_steps_lie_in_blocks(model: LoadedModel) -> None:
    """A block that comes with the plan is used within it."""
    alone = Driver(model).generate(0, prompt(30), params(temperature=0.0), 6)
    driver = Driver(model)
    found = tokens_of(driver.step({0: 30}, [driver.admit(0, prompt(30), params(temperature=0.0), block_ids=[7])]))[0]
    plan = driver.plan({0: 1})
    grown = {"num_steps": 5, "grow": i32_bytes(np.array([0, 11], np.int32))}
    result = driver.runner.execute(StepPlan(**{f: getattr(plan, f) for f in plan.__struct_fields__} | grown))
    assert found + tokens_of(result)[0] == alone
