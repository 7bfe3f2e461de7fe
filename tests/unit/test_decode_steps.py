"""Several decode steps in one plan, as the core sees them (rule 11)."""

import numpy as np
import pytest

from core_harness import Harness
from core_proc.request import RequestStatus
from core_proc.step_results import BadResult
from protocol.codec import f32_bytes, i32_bytes, i32_column
from protocol.messages import Finish, Outputs
from protocol.steps import LogprobRows, RowError, StepPlan, StepResult, StepStatus

STEP_US = 2_000


def engine_of_short_steps(*prompts: int, max_tokens: int = 100, step_us: int = STEP_US, **config) -> Harness:
    """Requests 1, 2, … have had their first tokens, and the core knows what a decode takes."""
    engine = Harness(**{"num_blocks": 256, "window": 1} | config)
    for number, prompt in enumerate(prompts, start=1):
        engine.add(number, prompt, max_tokens=max_tokens)
    engine.step()
    engine.core.clock.decodes.measured(len(prompts), step_us)
    return engine


def test_a_plan_of_decodes_is_run_four_times():
    engine = engine_of_short_steps(4, 6)
    plan = engine.plan()
    assert plan.num_steps == 4 and i32_column(plan.num_tokens).tolist() == [1, 1]
    rows = engine.core.rows
    assert rows.in_flight[:2].tolist() == [4, 4] and rows.num_computed[engine.core.live.order].tolist() == [8, 10]
    engine.answer()
    assert engine.outputs(1)[0] == [104, 105, 106, 107, 108] and engine.outputs(2)[0] == [106, 107, 108, 109, 110]
    assert rows.in_flight[:2].tolist() == [0, 0] and rows.num_applied[engine.core.live.order].tolist() == [8, 10]
    engine.check()


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("max_decode_steps", [1, 3, 4, 16])
def test_the_same_tokens_with_any_number_of_steps(window, max_decode_steps):
    engine = engine_of_short_steps(4, 9, 17, max_tokens=30, window=window, max_decode_steps=max_decode_steps, step_us=500)
    seen = set()
    for _ in range(200):
        engine.plan()
        plan = engine.plan() or (engine.plans[-1] if engine.plans else None)
        if plan is None:
            break
        seen.add(plan.num_steps)
        engine.answer(took_us=500 * engine.plans[0].num_steps)
        engine.check()
    for number, prompt in enumerate((4, 9, 17), start=1):
        assert engine.outputs(number) == ([100 + prompt + i for i in range(30)], Finish.LENGTH)
    assert max(seen) == max_decode_steps and engine.core.kv.num_free == 256


def test_one_step_while_anybody_waits():
    engine = engine_of_short_steps(4, max_num_seqs=1)
    engine.add(2, 4)
    assert engine.plan().num_steps == 1


def test_one_step_beside_a_chunk():
    engine = engine_of_short_steps(4, max_num_batched_tokens=8)
    engine.add(2, 20, max_tokens=50)
    assert [engine.step().num_steps for _ in range(3)] == [1, 1, 1]
    plan = engine.plan()
    assert plan.num_steps == 4 and engine.rows_of(plan) == {1: (7, 1), 2: (20, 1)}


def test_never_past_what_a_row_may_still_sample():
    engine = engine_of_short_steps(4, max_tokens=100)
    engine.add(2, 4, max_tokens=4)
    engine.step()
    plan = engine.plan()
    assert plan.num_steps == 3
    engine.answer()
    assert engine.outputs(2) == ([104, 105, 106, 107], Finish.LENGTH)
    assert engine.plan().num_steps == 4


def test_twenty_milliseconds_at_most():
    steps = [engine_of_short_steps(4, step_us=step_us).plan().num_steps for step_us in (4_900, 5_100, 9_000, 11_000, 80_000)]
    assert steps == [4, 3, 2, 1, 1]


def test_more_milliseconds_for_who_wants_them():
    assert engine_of_short_steps(4, step_us=80_000, max_plan_ms=1_000.0).plan().num_steps == 4
    assert engine_of_short_steps(4, step_us=1_000, max_plan_ms=0.0).plan().num_steps == 1


def test_the_bound_on_steps_bounds_the_plan_too():
    assert engine_of_short_steps(4, step_us=2_000, max_step_ms=5.0).plan().num_steps == 2


def test_a_clock_that_knows_nothing_allows_one():
    engine = Harness()
    engine.add(1, 4)
    engine.step()
    assert engine.plan().num_steps == 1


def test_only_free_blocks_are_taken_and_nobody_is_preempted():
    engine = engine_of_short_steps(6, 6, num_blocks=5, max_tokens=14)     # two blocks each, one is free
    plan = engine.plan()
    assert plan.num_steps == 2 and not plan.grow             # positions 6 and 7; a third step needs two blocks
    engine.answer()
    assert engine.plan().num_steps == 1                      # position 8 of the first; the second has been preempted for it
    assert len(engine.core.live.running) == 1


def test_blocks_for_all_steps_come_with_the_plan():
    engine = engine_of_short_steps(6)
    plan = engine.plan()
    assert i32_column(plan.grow).reshape(-1, 2)[:, 0].tolist() == [0]      # positions 6 … 9
    assert engine.core.rows.num_blocks[0] == 3


def test_suspects_run_single_steps():
    engine = engine_of_short_steps(4)
    engine.plan()
    engine.answer(StepStatus.FAILED_INTERNAL)
    engine.plan()
    engine.answer(StepStatus.FAILED_INTERNAL)
    assert engine.plan().num_steps == 1


def test_a_failed_plan_is_taken_back_whole():
    engine = engine_of_short_steps(4, 5)
    assert engine.plan().num_steps == 4
    engine.answer(StepStatus.FAILED_MEMORY)
    plan = engine.plan()
    assert sorted(a.num_computed for a in plan.admit) == [4, 5] and plan.num_steps == 4
    engine.answer()
    assert engine.outputs(1)[0] == [104, 105, 106, 107, 108]


def test_tokens_after_a_stop_are_dropped():
    engine = engine_of_short_steps(4)
    engine.add(2, 4, max_tokens=50, stop_ids=[7])
    engine.step()
    engine.plan()
    engine.answer(token=[5, 7, 8, 9])
    assert engine.outputs(2) == ([104, 5, 7], Finish.STOP)
    assert engine.outputs(1)[0][-4:] == [5, 7, 8, 9]
    engine.check()


def test_a_stop_publishes_what_stands_in_memory_and_no_more():
    engine = engine_of_short_steps(9)                         # positions 0 … 8, one token of output
    engine.add(2, 1, max_tokens=50)
    engine.step()
    request = engine.add(3, [31, 32, 33], max_tokens=50, stop_ids=[7])
    engine.step()
    engine.plan()
    engine.answer(token=[7, 8, 9, 10])                        # positions 3 … 6 were written, 4 tokens are known
    assert engine.outputs(3) == ([103, 7], Finish.STOP)
    ids = np.array([31, 32, 33, 103], np.int32)
    assert engine.core.kv.pool.lookup(request.block_hash(0, ids, 4)) is not None
    engine.check()


@pytest.mark.parametrize("good_before", [0, 1, 3])
def test_an_error_within_keeps_what_came_before(good_before):
    engine = engine_of_short_steps(4, 6)
    engine.plan()
    engine.answer(row_errors=[(0, RowError.NAN_LOGITS)], good_before=good_before)
    tokens = [104, 105, 106, 107, 108]
    assert engine.outputs(1) == (tokens[:1 + good_before], Finish.ROW_ERROR)
    assert engine.outputs(2)[0] == [106, 107, 108, 109, 110]
    engine.check()


def test_a_stop_before_an_error_wins():
    engine = engine_of_short_steps(4, max_tokens=3)
    assert engine.plan().num_steps == 2
    engine.answer(row_errors=[(0, RowError.NAN_LOGITS)], good_before=1)
    assert engine.outputs(1)[1] is Finish.ROW_ERROR
    engine = engine_of_short_steps(4)
    request = engine.add(2, 4, max_tokens=50, stop_ids=[7])
    engine.step()
    engine.plan()
    at = int(np.flatnonzero(engine.core.steps[0].rows == request.req_idx)[0])
    engine.answer(token=[7, 8, 9, 10], row_errors=[(at, RowError.NAN_LOGITS)], good_before=1)
    assert engine.outputs(2) == ([104, 7], Finish.STOP)


def test_a_preempted_request_accepts_all_its_late_tokens():
    engine = engine_of_short_steps(4, 6)
    second = engine.core.live.running[1]
    engine.plan()
    engine.core.live.preempt(second)
    assert (second.num_in_flight, second.steps_in_flight) == (4, 1)
    engine.answer()
    assert (second.status, second.num_in_flight, second.num_tokens) == (RequestStatus.WAITING, 0, 11)
    engine.run()
    assert engine.outputs(2)[0][:6] == [106, 107, 108, 109, 110, 111]
    engine.check()


def test_a_preempted_request_ends_on_a_late_token():
    engine = engine_of_short_steps(4)
    second = engine.add(2, 4, max_tokens=50, stop_ids=[7])
    engine.step()
    engine.plan()
    engine.core.live.preempt(second)
    engine.answer(token=[5, 7, 8, 9])
    assert engine.outputs(2) == ([104, 5, 7], Finish.STOP)
    assert second.num_tokens == 7 and len(engine.core.live.waiting) == 0


def answer_with(engine: Harness, plan: StepPlan, num_out: list[int], tokens: list[int], **more) -> None:
    engine.plans.remove(plan)
    engine.core.apply(StepResult(1, 1, plan.step_id, StepStatus.OK, i32_bytes(num_out), i32_bytes(tokens), **more), engine.now_ns)


def logprobs_of(tokens: list[int]) -> LogprobRows:
    """Rows that name their token."""
    ids, values = ([v for token in tokens for v in pair(token)] for pair in (lambda t: (t, 1), lambda t: (-t, -1)))
    return LogprobRows(2, i32_bytes(ids), f32_bytes(values), i32_bytes(tokens))


@pytest.mark.parametrize(("num_out", "errors"), [([3], []), ([5], []), ([0], []), ([4], [0, 1]), ([-1], [0, 1]), ([4], [1, 1])])
def test_a_result_of_other_counts_is_a_contradiction(num_out, errors):
    engine = engine_of_short_steps(4)
    plan = engine.plan()
    with pytest.raises(BadResult):
        answer_with(engine, plan, num_out, [9] * max(0, *num_out), row_errors=i32_bytes(errors) if errors else None)


def test_logprobs_of_all_steps_and_of_kept_tokens_only():
    engine = engine_of_short_steps(4)
    engine.add(2, 4, max_tokens=50, stop_ids=[7], logprobs=1)
    answer_with(engine, engine.plan(), [1, 1], [20, 30], logprobs=logprobs_of([20, 30]))
    engine.core.take_outputs()
    flat = [21, 22, 23, 24, 31, 7, 33, 34]
    answer_with(engine, engine.plan(), [4, 4], flat, logprobs=logprobs_of(flat))
    found = {}
    for _, message in engine.core.take_outputs():
        assert isinstance(message, Outputs)
        count, ids = i32_column(message.count).tolist(), i32_column(message.token_ids).tolist()
        if message.logprobs is not None:
            table = i32_column(message.logprobs.ids).reshape(sum(count), message.logprobs.width)
            found |= {token: row for token, row in zip(ids, table[:, 0].tolist(), strict=True)}
    assert found[31] == 31 and found[7] == 7 and 33 not in found


def test_logprobs_of_others_are_nothing_to_one_that_gained_nothing():
    """A chunk of a preempted request comes back beside rows that are narrower than its own."""
    engine = Harness(max_num_batched_tokens=8, window=1)
    engine.add(1, 4, max_tokens=20, logprobs=0)
    answer_with(engine, engine.plan(), [1], [20], logprobs=LogprobRows(1, i32_bytes([20]), f32_bytes([-1]), i32_bytes([1])))
    request = engine.add(2, 20, max_tokens=20, logprobs=1)
    plan = engine.plan()
    engine.core.live.preempt(request)
    answer_with(engine, plan, [1, 0], [21], logprobs=LogprobRows(1, i32_bytes([21]), f32_bytes([-1]), i32_bytes([1])))
    request.logprobs.append(*(np.array([[30, 1]], dtype) for dtype in (np.int32, np.float32)), np.array([1], np.int32))
    assert request.logprobs.rows(0, 1)[0].tolist() == [[30, 1]]


def test_many_tokens_of_many_streams_in_one_message():
    engine = engine_of_short_steps(4, 6, 9)
    engine.core.take_outputs()
    engine.plan()
    engine.answer()
    (_, message), = engine.core.take_outputs()
    assert i32_column(message.count).tolist() == [4, 4, 4]
    assert i32_column(message.token_ids).tolist() == [105, 106, 107, 108, 107, 108, 109, 110, 110, 111, 112, 113]


def test_the_clock_counts_all_steps():
    engine = engine_of_short_steps(4, window=2, step_us=4_000)
    assert engine.plan().num_steps == 4
    assert engine.core.next_timer_ns == engine.now_ns + 14_000_000
    engine.answer(took_us=16_000)
    assert engine.core.clock.decodes.at(1) == 4_000
