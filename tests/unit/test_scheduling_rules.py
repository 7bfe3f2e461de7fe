"""One test for each rule of scheduling (docs/architecture.md lists them)."""

import numpy as np
import pytest

from core_harness import Harness, key_of
from core_proc.request import RequestStatus
from protocol.codec import i32_column
from protocol.messages import Finish, Rejected
from protocol.steps import RowError, StepStatus


def test_rule_1_rows_and_blocks_are_free_at_once():
    engine = Harness(num_blocks=4, window=2)
    engine.add(1, 8, max_tokens=8)
    engine.plan()
    engine.plan()
    engine.abort(1)
    assert engine.core.kv.num_free == 4
    engine.add(2, 12, max_tokens=2)
    engine.answer()
    assert set(engine.rows_of(engine.plan())) == {2}
    engine.answer()      # of the aborted request: dropped
    engine.answer()
    engine.run()
    assert engine.outputs(1) == ([], Finish.NONE)
    assert engine.outputs(2)[1] is Finish.LENGTH


def test_rule_2_a_late_token_of_a_finished_request_is_dropped():
    engine = Harness(window=2)
    engine.add(1, 4, max_tokens=10, stop_ids=[7])
    engine.plan(), engine.plan()
    engine.answer(token=7)
    engine.answer(token=8)
    assert engine.outputs(1) == ([7], Finish.STOP)
    engine.check()


def test_rule_2_a_complete_stream_gets_its_end_and_nothing_else():
    engine = Harness()
    engine.add(1, 4, max_tokens=3, output_ids=[5, 6, 7])
    engine.add(2, 4, max_tokens=9, output_ids=[5, 6], stop_ids=[6])
    assert engine.plan() is None
    assert engine.outputs(1)[1] is Finish.LENGTH
    assert engine.outputs(2)[1] is Finish.STOP


def test_rule_3_no_sample_past_max_tokens():
    engine = Harness(window=2)
    engine.add(1, 4, max_tokens=2)
    assert engine.plan() and engine.plan()
    engine.answer()
    assert engine.plan() is None
    engine.answer()
    assert len(engine.outputs(1)[0]) == 2


def test_rule_3_no_sample_past_max_model_len():
    engine = Harness(max_model_len=8)
    engine.add(1, 4, max_tokens=5)
    rejected = [m for _, m in engine.core.take_outputs() if isinstance(m, Rejected)]
    assert "4 tokens" in rejected[0].message and "max_tokens = 5" in rejected[0].message and "8" in rejected[0].message


def test_rule_4_a_preempted_request_accepts_its_late_token():
    engine = Harness(num_blocks=5, window=2)
    engine.add(1, 8, max_tokens=9)
    late = engine.add(2, 7, max_tokens=3)
    engine.plan()
    engine.plan()       # 1 takes the last block
    engine.answer()
    engine.plan()       # 2 would need one
    assert (late.status, late.num_in_flight) == (RequestStatus.WAITING, 1)
    known = late.num_tokens
    while late.num_in_flight:
        engine.answer()
    assert late.num_tokens == known + 1
    engine.run()
    assert len(engine.outputs(2)[0]) == 3 and engine.outputs(2)[1] is Finish.LENGTH


def test_rule_4_no_readmission_while_a_step_holds_it():
    engine = Harness(window=2, max_num_batched_tokens=8)
    request = engine.add(1, 24)
    engine.add(2, 4)
    engine.plan()
    engine.core.live.preempt(request)
    assert request.steps_in_flight == 1
    assert set(engine.rows_of(engine.plan())) == {2}
    engine.answer()
    assert request.steps_in_flight == 0
    engine.answer()
    assert 1 in engine.rows_of(engine.plan())


def test_rule_6_published_only_when_confirmed():
    engine = Harness(window=2)
    prompt = list(range(1, 10))
    first = engine.add(1, prompt)
    engine.plan()
    assert engine.core.kv.pool.lookup(first.block_hash(0, np.array(prompt, np.int32), 4)) is None
    engine.answer()
    assert engine.core.kv.pool.lookup(first.block_hash(1, np.array(prompt, np.int32), 4)) is not None
    second = engine.add(2, prompt)
    assert engine.rows_of(engine.plan())[2] == (8, 1)
    assert second.num_cached_tokens == 8


def test_rule_6_a_hit_never_covers_all_tokens():
    engine = Harness()
    engine.add(1, [1, 2, 3, 4, 5, 6, 7, 8])
    engine.run()
    engine.add(2, [1, 2, 3, 4, 5, 6, 7, 8])
    assert engine.rows_of(engine.plan())[2] == (4, 4)


def test_rule_6_a_shared_prompt_is_computed_once():
    """The second waits for a living writer, and not for a dead one."""
    engine = Harness(max_num_batched_tokens=8)
    prompt = list(range(1, 22))
    engine.add(1, prompt)
    engine.add(2, prompt)
    engine.add(3, 4)
    plan = engine.plan()
    assert engine.rows_of(plan) == {1: (0, 8)}
    engine.abort(1)
    engine.answer()
    assert engine.rows_of(engine.plan()) == {2: (0, 8)}


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_rule_6_children_share_the_blocks_of_their_prompt(enable_prefix_caching):
    engine = Harness(enable_prefix_caching=enable_prefix_caching)
    prompt = list(range(1, 18))
    for child in range(4):
        engine.add(1, prompt, child=child, max_tokens=3)
    computed = 0
    for _ in range(20):
        plan = engine.step()
        if plan is None:
            break
        computed += int(i32_column(plan.num_tokens).sum())
    blocks = (len(prompt) - 1) // 4 * 4
    assert computed == blocks + 4 * (len(prompt) - blocks) + 4 * 2      # the shared part once
    assert all(len(engine.outputs(1, child)[0]) == 3 for child in range(4))


def test_cache_off_shares_with_nobody_else():
    engine = Harness(enable_prefix_caching=False)
    engine.add(1, list(range(1, 18)))
    engine.run()
    engine.add(2, list(range(1, 18)))
    assert engine.rows_of(engine.plan()) == {2: (0, 17)}


def test_cache_salt_separates():
    engine = Harness()
    engine.add(1, list(range(1, 18)), cache_salt=b"a")
    engine.run()
    engine.add(2, list(range(1, 18)), cache_salt=b"b")
    engine.add(3, list(range(1, 18)), cache_salt=b"a")
    assert engine.rows_of(engine.plan()) == {2: (0, 17), 3: (16, 1)}


def test_rule_7_a_failed_step_is_taken_back():
    engine = Harness(window=2)
    engine.add(1, 6, max_tokens=5)
    engine.step()
    engine.plan(), engine.plan()
    failed = engine.plans[0].step_id
    engine.answer(StepStatus.FAILED_INTERNAL)
    engine.answer(StepStatus.SKIPPED)
    plan = engine.plan()
    assert plan.restart_after == failed
    assert [(a.num_computed, len(i32_column(a.token_ids))) for a in plan.admit] == [(6, 7)]
    assert not plan.grow
    engine.answer()
    engine.run()
    assert engine.outputs(1) == ([106, 107, 108, 109, 110], Finish.LENGTH)


def test_rule_7_memory_halves_the_budget_then_takes_rows_then_fails_one_alone():
    engine = Harness(max_num_batched_tokens=8)
    engine.add(1, 3, max_tokens=4)
    engine.add(2, 3, max_tokens=4)
    seen = []
    for _ in range(5):
        engine.step(status=StepStatus.FAILED_MEMORY)
        seen.append((engine.core.memory.budget, len(engine.core.live.running), len(engine.core.live)))
    assert seen == [(4, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 2), (8, 0, 1)]
    for _ in range(40):
        if engine.step(status=StepStatus.FAILED_MEMORY) is None:
            break
    assert engine.outputs(1)[1] is Finish.MEMORY and engine.outputs(2)[1] is Finish.MEMORY
    assert engine.core.kv.num_free == 64


def test_rule_7_only_the_request_of_the_failed_step_fails_for_memory():
    engine = Harness(max_num_batched_tokens=1, window=2)
    engine.add(1, 3)
    engine.plan()
    engine.abort(1)
    engine.add(2, 3)
    engine.plan()
    engine.answer(StepStatus.FAILED_MEMORY)      # of 1, which is gone; 2 runs alone now
    engine.answer(StepStatus.SKIPPED)
    engine.run()
    assert engine.outputs(2)[1] is Finish.LENGTH


def test_rule_7_after_eight_good_steps_all_is_as_before():
    engine = Harness(max_num_batched_tokens=8)
    engine.add(1, 8, max_tokens=40)
    engine.step(status=StepStatus.FAILED_MEMORY)
    assert engine.core.memory.budget == 4
    for _ in range(8):
        engine.step()
    assert engine.core.memory.budget == 8


def test_rule_7_a_row_fails_alone():
    engine = Harness()
    engine.add(1, 4)
    engine.add(2, 4)
    plan = engine.plan()
    at = next(i for i, row in enumerate(i32_column(plan.rows)) if engine.core.rows.request[row].key == key_of(1))
    engine.answer(row_errors=[(at, RowError.NAN_LOGITS)])
    engine.run()
    assert engine.outputs(1) == ([], Finish.ROW_ERROR)
    assert len(engine.outputs(2)[0]) == 4


def test_rule_8_victims_come_from_the_end_and_never_the_first():
    engine = Harness(num_blocks=6)
    for number in (1, 2, 3):
        engine.add(number, 7, max_tokens=10)
    engine.step()
    engine.step()
    assert [r.key for r in engine.core.live.running] == [key_of(1), key_of(2), key_of(3)]
    engine.step()      # 1 needs a third block
    assert [r.key for r in engine.core.live.running] == [key_of(1), key_of(2)]
    assert engine.core.live.waiting.peek().key == key_of(3)
    engine.run()
    assert all(len(engine.outputs(number)[0]) == 10 for number in (1, 2, 3))
    engine.check()


def test_rule_8_nobody_behind_one_that_does_not_fit():
    engine = Harness(num_blocks=6)
    engine.add(1, 12, max_tokens=2)
    engine.step()
    engine.add(2, 16, max_tokens=2)
    engine.add(3, 1, max_tokens=2)
    assert set(engine.rows_of(engine.plan())) == {1}


def test_rule_8_the_watermark_does_not_count_when_nothing_runs():
    engine = Harness(num_blocks=10, watermark=0.5)
    engine.add(1, 36, max_tokens=2)
    engine.add(2, 1, max_tokens=2)
    assert set(engine.rows_of(engine.plan())) == {1}


def test_rule_8_what_can_never_fit_is_refused():
    engine = Harness(num_blocks=4)
    assert engine.add(1, 10, max_tokens=7) is not None      # 16 tokens have K/V: 4 blocks
    assert engine.add(2, 10, max_tokens=8) is None
    rejected = [m for _, m in engine.core.take_outputs() if isinstance(m, Rejected)]
    assert "16 tokens" in rejected[0].message
