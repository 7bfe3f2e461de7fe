"""The founding document's scheduler tests, and what else a frontend sees of scheduling."""

import numpy as np
import pytest

from core_harness import FRONTEND, VOCAB, Harness, key_of
from core_proc.request import RequestStatus
from core_proc.scheduler import share_budget
from protocol.codec import i32_bytes, i32_column
from protocol.messages import Abort, Finish, Rejected
from protocol.steps import StepStatus


def test_add_request():
    engine = Harness()
    request = engine.add(1, 10)
    assert request.status is RequestStatus.WAITING
    assert (len(engine.core.live), len(engine.core.live.waiting), len(engine.core.live.running)) == (1, 1, 0)
    assert [type(m).__name__ for _, m in engine.core.take_outputs()] == ["EngineReady", "Accepted"]


def test_schedule_single_new_request():
    engine = Harness()
    request = engine.add(1, 10)
    plan = engine.plan()
    assert engine.rows_of(plan) == {1: (0, 10)}
    (admission,) = plan.admit
    assert i32_column(admission.token_ids).tolist() == request.token_ids.tolist()
    assert (admission.req_idx, admission.prompt_len, admission.num_computed) == (request.req_idx, 10, 0)
    assert len(i32_column(admission.block_ids)) == 3      # of 4 tokens
    assert request.status is RequestStatus.RUNNING
    engine.answer()
    assert engine.rows_of(engine.plan()) == {1: (10, 1)}


def test_schedule_multiple_requests():
    engine = Harness()
    for number in (1, 2, 3):
        engine.add(number, 5 * number)
    plan = engine.plan()
    assert engine.rows_of(plan) == {1: (0, 5), 2: (0, 10), 3: (0, 15)}
    assert len(set(i32_column(plan.rows).tolist())) == 3
    engine.answer()
    assert engine.rows_of(engine.plan()) == {1: (5, 1), 2: (10, 1), 3: (15, 1)}


def test_token_budget():
    """max_num_batched_tokens bounds every step; decodes go before a chunk."""
    engine = Harness(max_num_batched_tokens=16)
    engine.add(1, 4, max_tokens=20)
    engine.add(2, 40)
    seen = []
    for _ in range(4):
        plan = engine.plan()
        assert i32_column(plan.num_tokens).sum() <= 16
        seen.append(engine.rows_of(plan))
        engine.answer()
    assert seen == [{1: (0, 4), 2: (0, 12)}, {1: (4, 1), 2: (12, 15)}, {1: (5, 1), 2: (27, 13)}, {1: (6, 1), 2: (40, 1)}]


def test_max_num_seqs():
    engine = Harness(max_num_seqs=2)
    for number in (1, 2, 3):
        engine.add(number, 4, max_tokens=2)
    assert set(engine.rows_of(engine.plan())) == {1, 2}
    assert len(engine.core.live.waiting) == 1
    engine.answer()
    engine.step()
    assert set(engine.rows_of(engine.plan())) == {3}


def test_share_of_the_budget():
    def shared(left, budget):
        return share_budget(np.array(left, np.int32), budget).tolist()

    assert shared([1, 1, 1], 2) == [1, 1, 0]
    assert shared([40, 1, 1], 16) == [14, 1, 1]         # a chunk leaves one for each decode behind it
    assert shared([40, 1, 1], 2) == [1, 1, 0]           # but takes one at least
    assert shared([1, 30, 30, 1], 40) == [1, 30, 8, 1]
    assert shared([1, 0, 1], 1) == [1, 0, 0]
    assert shared([], 5) == []


def test_priority_policy_orders_and_preempts():
    engine = Harness(scheduling_policy="priority", max_num_seqs=1)
    engine.add(1, 4, priority=5)
    engine.add(2, 4, priority=-5)
    assert set(engine.rows_of(engine.plan())) == {2}


def test_queue_bound():
    engine = Harness(max_num_queued_reqs=1)
    assert engine.add(1, 4) is not None
    assert engine.add(2, 4) is None
    rejected = [m for _, m in engine.core.take_outputs() if isinstance(m, Rejected)]
    assert (rejected[0].code, "max_num_queued_reqs = 1" in rejected[0].message) == ("queue_full", True)


@pytest.mark.parametrize("column", ["stop_token_ids", "eos_token_ids", "allowed_token_ids", "logit_bias_ids", "bad_words_ids"])
@pytest.mark.parametrize(("token", "accepted"), [(VOCAB - 1, True), (VOCAB, False), (-1, False)])
def test_no_token_id_out_of_the_vocabulary_gets_into_a_plan(column, token, accepted):
    """The worker would answer with bad_plan, which ends the engine."""
    engine = Harness()
    lists = {"stop_ids": [token]} if column == "stop_token_ids" else {column: i32_bytes([token])}
    assert (engine.add(1, 4, **lists) is not None) == accepted
    rejected = [(m.field, m.message) for _, m in engine.core.take_outputs() if isinstance(m, Rejected)]
    assert rejected == ([] if accepted else [(column, f"token id {token} is not in [0, {VOCAB})")])


def test_abort_needs_the_newest_attach_and_its_own_channel():
    engine = Harness()
    engine.add(1, 4)
    engine.core.connect(b"f1.e1", 1)
    engine.core.handle(b"f1.e1", Abort(1, key_of(1), None, 1, 0), 1)
    assert len(engine.core.live) == 1
    engine.core.handle(FRONTEND, Abort(2, key_of(1), None, 1, 9), 1)
    assert len(engine.core.live) == 1
    engine.abort(1)
    assert len(engine.core.live) == 0


def test_a_lost_frontend_ends_its_streams():
    engine = Harness()
    engine.add(1, 4)
    engine.step()
    engine.core.disconnect(FRONTEND)
    assert len(engine.core.live) == 0 and engine.core.kv.num_free == 64


def test_poison_is_convicted_alone_and_innocents_are_not():
    """A request that fails every step it is in; the others lose time, never their stream."""
    engine = Harness()
    for number in range(1, 6):
        engine.add(number, 6, max_tokens=12)
    for _ in range(200):
        plan = engine.plan()
        if plan is None:
            break
        engine.answer(StepStatus.FAILED_INTERNAL if 3 in engine.rows_of(plan) else StepStatus.OK)
    assert engine.outputs(3)[1] is Finish.CONVICTED
    for number in (1, 2, 4, 5):
        assert (len(engine.outputs(number)[0]), engine.outputs(number)[1]) == (12, Finish.LENGTH)
    engine.check()


def test_a_failed_step_counts_only_against_rows_that_it_would_have_carried_further():
    engine = Harness(max_num_batched_tokens=1)
    request = engine.add(1, 8, max_tokens=9)
    for _ in range(10):
        engine.step()                    # 10 tokens confirmed
    engine.core.live.preempt(request)    # 8 of them are in published blocks
    engine.step(status=StepStatus.FAILED_INTERNAL)
    assert not engine.core.suspects.any
    engine.step(), engine.step()
    engine.step(status=StepStatus.FAILED_INTERNAL)
    assert engine.core.suspects.any


def test_the_window_closes_for_suspects_and_not_for_one_strike():
    engine = Harness(window=2)
    engine.add(1, 6, max_tokens=12)
    other = engine.add(2, 6, max_tokens=12)
    engine.plan()
    engine.answer(StepStatus.FAILED_INTERNAL)
    engine.core.live.preempt(other)      # it keeps its strike: it gets no further for now
    engine.plan()
    assert engine.core.wants_plan(engine.now_ns)
    engine.answer(StepStatus.FAILED_INTERNAL)
    engine.plan()                        # both are suspects
    assert not engine.core.wants_plan(engine.now_ns)


def test_a_late_token_clears_a_strike():
    engine = Harness(window=2)
    request = engine.add(1, 6, max_tokens=12)
    engine.plan()
    engine.answer(StepStatus.FAILED_INTERNAL)
    engine.plan()
    engine.core.live.preempt(request)
    engine.answer()
    assert not engine.core.suspects.any


def test_outputs_at_the_end_only():
    engine = Harness()
    engine.add(1, 4, max_tokens=6, final=True)
    engine.step()
    engine.step()
    assert engine.outputs(1) == ([], Finish.NONE)
    engine.run()
    assert engine.outputs(1) == ([104, 105, 106, 107, 108, 109], Finish.LENGTH)


def test_min_tokens_before_a_stop_id():
    engine = Harness()
    engine.add(1, 4, max_tokens=6, stop_ids=[7], min_tokens=2)
    for _ in range(3):
        engine.step(token=7)
    assert engine.outputs(1) == ([7, 7], Finish.STOP)


def test_many_stop_ids():
    engine = Harness()
    engine.add(1, 4, max_tokens=6, stop_ids=list(range(200, 230)))
    engine.step(token=229)
    assert engine.outputs(1) == ([229], Finish.STOP)


def test_cached_tokens_are_counted_at_a_first_admission_only():
    engine = Harness()
    engine.add(1, list(range(1, 10)))
    engine.run()
    request = engine.add(2, list(range(1, 10)), max_tokens=2)
    engine.step()
    assert engine.core.live.num_cached_tokens == 8
    engine.core.live.preempt(request)
    engine.run()
    assert engine.core.live.num_cached_tokens == 8
