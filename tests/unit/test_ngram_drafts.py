"""Guesses by prompt lookup: what the core proposes, reserves and takes off again (rules 5 and 11)."""

import random

import numpy as np
import pytest

from core_harness import Harness
from core_proc.ngram_drafts import FIRST_DRAFTS, PATIENCE
from core_proc.ngram_index import NgramIndex
from core_proc.request import RequestStatus
from core_proc.request_rows import RequestRows
from core_proc.step_results import BadResult
from protocol.codec import i32_bytes, i32_column
from protocol.messages import Finish
from protocol.steps import RowError, StepPlan, StepResult, StepStatus

# --- the index ---


def brute_force(tokens: list[int], longest: int, shortest: int) -> tuple[int, int]:
    """(position after the newest earlier occurrence of the longest tail, its length)."""
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        tail = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length:end] == tail:
                return end, length
    return 0, 0


@pytest.mark.parametrize(("longest", "shortest", "vocab"), [(4, 2, 6), (3, 3, 4), (1, 1, 3), (8, 1, 2), (4, 2, 40_000)])
def test_the_index_finds_what_a_search_finds(longest, shortest, vocab):
    rng = random.Random(longest * vocab)
    rows = RequestRows(5, 4096, 32)
    index = NgramIndex(rows, longest, shortest)
    texts: list[list[int]] = [[] for _ in range(5)]
    equal = total = 0
    for turn in range(200):
        chosen = np.array(sorted(rng.sample(range(5), rng.randint(1, 5))))
        for row in chosen:
            if turn and rng.random() < 0.02:
                index.reset(np.array([row]))
                texts[row] = []
            new = texts[row][-9:] if texts[row] and rng.random() < 0.2 else [rng.randrange(vocab) for _ in range(rng.randint(1, 12))]
            rows.tokens[row, len(texts[row]):len(texts[row]) + len(new)] = new
            texts[row] += new
            rows.num_tokens[row] = len(texts[row])
        index.catch_up(chosen)
        source, length = index.find(chosen)
        for row, at, count in zip(chosen, source.tolist(), length.tolist(), strict=True):
            text = texts[row]
            assert count == 0 or (at < len(text) and text[at - count:at] == text[len(text) - count:])
            total += 1
            equal += (at, count) == brute_force(text, longest, shortest)
    assert equal >= 0.97 * total             # a collision may lose one


def test_what_follows_is_repeated_where_it_ends():
    rows = RequestRows(2, 64, 32)
    rows.tokens[1, :7] = [5, 6, 7, 8, 9, 8, 9]
    rows.num_tokens[:] = 0, 7
    index = NgramIndex(rows, 2, 2)
    index.catch_up(np.array([1]))
    source, length = index.find(np.array([1]))
    assert (source.tolist(), length.tolist()) == ([5], [2])
    assert index.following(np.array([1]), source, np.array([5])).tolist() == [8, 9, 8, 9, 8]


def test_many_rows_cost_one_search():
    """Thousands of tokens at once, and nothing but the newest one after that."""
    rows = RequestRows(64, 8192, 32)
    rows.tokens[:] = np.random.default_rng(0).integers(0, 50, rows.tokens.shape)
    rows.num_tokens[:] = 8000
    index, every = NgramIndex(rows, 4, 2), np.arange(64)
    index.catch_up(every)
    assert index._entered.tolist() == [7999] * 64
    rows.num_tokens[:] += 1
    entered = []
    index._slots = lambda grams, slots=index._slots: entered.append(len(grams)) or slots(grams)
    index.catch_up(every)
    index.find(every)
    assert entered == [64, 64]


# --- the scheduler ---


def speculating(*prompts: int, period: int = 7, max_tokens: int = 60, **config) -> Harness:
    """Requests whose text repeats itself; each has had its first token."""
    settings = {"num_blocks": 256, "window": 2, "speculative": "ngram", "max_num_batched_tokens": 256} | config
    engine = Harness(period=period, **settings)
    for number, length in enumerate(prompts, start=1):
        engine.add(number, [100 + i % period for i in range(length)], max_tokens=max_tokens, cache_salt=bytes([number]))
    engine.step()
    return engine


def drafts_of(plan: StepPlan) -> list[list[int]]:
    if plan.num_drafts is None:
        return [[] for _ in i32_column(plan.rows)]
    return [part.tolist() for part in np.split(i32_column(plan.drafts), np.cumsum(i32_column(plan.num_drafts))[:-1])]


def expected(prompt: int, count: int, period: int = 7) -> list[int]:
    return [100 + (prompt + i) % period for i in range(count)]


def test_drafts_ride_with_a_decode():
    engine = speculating(20)
    plan = engine.plan()
    assert drafts_of(plan) == [expected(21, FIRST_DRAFTS)]
    assert i32_column(plan.num_tokens).tolist() == [1 + FIRST_DRAFTS] and plan.num_steps == 1
    rows, row = engine.core.rows, engine.core.live.order[0]
    assert (rows.in_flight[row], rows.num_computed[row]) == (1 + FIRST_DRAFTS, 21 + FIRST_DRAFTS)
    engine.answer()
    assert engine.outputs(1)[0] == expected(20, 2 + FIRST_DRAFTS)
    assert (rows.in_flight[row], rows.num_computed[row], rows.num_applied[row]) == (0, 23, 23)
    engine.check()


@pytest.mark.parametrize("num_right", [0, 1])
def test_rejected_drafts_are_taken_off(num_right):
    engine = speculating(20)
    rows, row = engine.core.rows, engine.core.live.order[0]
    drafts, = drafts_of(engine.plan())
    engine.answer(token=drafts[:num_right] + [9, 9, 9])
    assert engine.outputs(1)[0] == expected(20, 1) + drafts[:num_right] + [9]
    assert (rows.num_computed[row], rows.num_applied[row], rows.in_flight[row]) == (21 + num_right, 21 + num_right, 0)
    engine.check()
    assert engine.rows_of(engine.plan()) == {1: (21 + num_right, 1)}


def test_as_many_as_were_right_twice_over():
    engine = speculating(20, num_speculative_tokens=16)
    lengths = []
    for _ in range(5):
        lengths.append(len(drafts_of(engine.plan())[0]))
        engine.answer()
    assert lengths == [2, 6, 14, 16, 16]


def test_the_same_tokens_with_and_without():
    for window in (1, 2):
        for config in ({"speculative": "none"}, {}, {"num_speculative_tokens": 1}, {"num_speculative_tokens": 20, "prompt_lookup_min": 1}):
            engine = speculating(3, 20, 31, window=window, **config)
            steps = 0
            while engine.plan() or engine.plans:
                engine.answer()
                engine.check()
                steps += 1
            for number, prompt in enumerate((3, 20, 31), start=1):
                assert engine.outputs(number) == (expected(prompt, 60), Finish.LENGTH), (window, config)
            assert engine.core.kv.num_free == 256
            assert (steps < 50) == (config.get("speculative") is None)


def test_rule_5_no_sample_while_one_is_in_flight():
    engine = speculating(20)
    engine.add(2, [900 - i for i in range(9)], max_tokens=100)
    assert set(engine.rows_of(engine.plan())) == {1, 2}
    assert engine.core.schedule(engine.now_ns) is None         # both may be guessed at: they need their last token
    engine.answer()
    assert set(engine.rows_of(engine.plan())) == {1, 2}


def test_rule_5_chunks_overlap():
    engine = speculating(20, max_num_batched_tokens=16)
    engine.add(2, [900 - i for i in range(40)], max_tokens=5)
    engine.plan()
    plan = engine.plan()
    assert set(engine.rows_of(plan)) == {2}


def quiet(engine: Harness) -> None:
    """Until nobody is guessed at any more."""
    for token in range(300, 300 + 2 * PATIENCE):
        if engine.plan() is None and not engine.plans:
            return
        engine.answer(token=token)


def test_who_says_nothing_twice_is_left_alone():
    engine = speculating(20, max_tokens=100)
    quiet(engine)
    assert engine.plan() and engine.plan()     # the window is open again
    assert drafts_of(engine.plans[0]) == [[]]


def test_who_repeats_itself_again_is_guessed_at_again():
    engine = speculating(20, max_tokens=100, window=1)
    quiet(engine)
    for token in (301, 302, 303, 304):
        assert drafts_of(engine.plan()) == [[]]
        engine.answer(token=token)
    plan = engine.plan()
    assert drafts_of(plan) == [[305, 306]]
    engine.answer(token=[305, 306, 307])
    assert drafts_of(engine.plan()) == [[308, 309, 310, 311, 312, 313]]


def test_never_past_the_last_token():
    engine = speculating(20, max_tokens=4)
    assert drafts_of(engine.plan()) == [expected(21, 2)]       # three samples are left: two drafts at most
    engine.answer()
    assert engine.outputs(1) == (expected(20, 4), Finish.LENGTH)
    engine = speculating(20, max_tokens=2)
    assert drafts_of(engine.plan()) == [[]]


def test_tokens_after_a_stop_are_dropped():
    engine = speculating(20)
    engine.add(2, [100 + i % 7 for i in range(20)], max_tokens=30, stop_ids=[expected(22, 1)[0]])
    engine.step()
    plan = engine.plan()
    assert all(drafts_of(plan))
    engine.answer()
    assert engine.outputs(2) == (expected(20, 3), Finish.STOP)
    engine.check()


def test_only_free_blocks_are_taken_and_nobody_is_preempted():
    engine = speculating(6, 7, num_blocks=5, period=2, max_tokens=14, prompt_lookup_min=1)     # two blocks each, one is free
    lengths = [len(drafts) for drafts in drafts_of(engine.plan())]
    assert lengths == [2, 0]                   # positions 6, 7, 8 of the first in the last block; 7 of the second has no place behind it
    assert len(engine.core.live.running) == 2 and engine.core.kv.num_free == 0
    engine.check()


def test_drafts_take_what_is_left_of_the_budget():
    engine = speculating(20, 20, 20)
    engine.core.budget._given = 6
    plan = engine.plan()
    assert i32_column(plan.num_tokens).tolist() == [3, 2, 1] and [len(d) for d in drafts_of(plan)] == [2, 1, 0]


def test_suspects_are_not_guessed_at():
    engine = speculating(20, 21)
    for _ in range(2):
        engine.plan()
        engine.answer(StepStatus.FAILED_INTERNAL)
    plan = engine.plan()
    assert len(i32_column(plan.rows)) == 1 and plan.num_drafts is None


def test_a_failed_step_takes_its_drafts_back():
    engine = speculating(20)
    engine.plan()
    engine.answer(StepStatus.FAILED_MEMORY)
    plan = engine.plan()
    assert [a.num_computed for a in plan.admit] == [20] and drafts_of(plan) == [expected(21, 2)]
    engine.answer()
    assert engine.outputs(1)[0] == expected(20, 4)
    engine.check()


def test_a_preempted_request_accepts_its_late_tokens():
    engine = speculating(20, 20)
    second = engine.core.live.running[1]
    engine.plan()
    engine.core.live.preempt(second)
    assert (second.num_in_flight, second.steps_in_flight) == (1 + FIRST_DRAFTS, 1)
    engine.answer()
    assert (second.status, second.num_in_flight, second.num_tokens) == (RequestStatus.WAITING, 0, 24)
    engine.run()
    assert engine.outputs(2) == (expected(20, 60), Finish.LENGTH)
    engine.check()


def test_an_error_behind_a_right_draft_keeps_it():
    engine = speculating(20, 20)
    engine.plan()
    engine.answer(row_errors=[(0, RowError.NAN_LOGITS)], good_before=2)
    outputs = [engine.outputs(number) for number in (1, 2)]
    assert (expected(20, 3), Finish.ROW_ERROR) in outputs and (expected(20, 4), Finish.NONE) in outputs
    engine.check()


@pytest.mark.parametrize("num_out", [0, 4, -1])
def test_a_result_of_other_counts_is_a_contradiction(num_out):
    engine = speculating(20)
    plan = engine.plan()
    with pytest.raises(BadResult):
        engine.core.apply(StepResult(1, 1, plan.step_id, StepStatus.OK, i32_bytes([num_out]), i32_bytes([9] * max(0, num_out))), 1)


def test_only_confirmed_tokens_are_published():
    """Rejected drafts have spoilt what lies behind; the block is offered when its tokens are known and written."""
    engine = speculating(21)                   # positions 0 … 20 written; the first token is known
    request = engine.core.live.running[0]
    row = request.req_idx
    engine.plan()                              # positions 21, 22, 23
    engine.answer(token=9)
    assert engine.core.rows.published[row] == 5 and engine.core.rows.num_applied[row] == 22
    engine.step(token=9)
    engine.step(token=9)
    assert engine.core.rows.published[row] == 6
    tokens = np.array([100 + i % 7 for i in range(22)] + [9, 9, 9], np.int32)
    assert engine.core.kv.pool.lookup(request.block_hash(5, tokens, 4)) is not None
    engine.check()


@pytest.mark.parametrize(("us_per_token", "pays"), [(10_000, False), (4_000, True)])
def test_no_drafts_where_they_do_not_pay(us_per_token, pays):
    """A guess that brings one token more must not take as long as two steps."""
    engine = speculating(20, window=1, max_tokens=100, max_decode_steps=1)
    for size in (1, 3):
        engine.core.clock.decodes.measured(size, 10_000 + us_per_token * (size - 1))
    for _ in range(10):
        assert bool(drafts_of(engine.plan())[0]) == pays
        engine.answer(token=[5] * 8)           # no guess is right
        engine.core.rows.tokens[0, engine.core.rows.num_tokens[0] - 1] = expected(20, 100)[engine.core.rows.num_tokens[0] - 21]
    assert engine.core.rows.num_tokens[0] == 31


@pytest.mark.parametrize(("step_us", "num_plans"), [(40_000, 1), (3_000, 2)])
def test_a_long_step_is_waited_for_and_a_short_one_not(step_us, num_plans):
    """A request that speculates beside others would else be in every second step only."""
    engine = speculating(20, 20, max_tokens=100)
    engine.step()
    drafts, other = engine.core.scheduler.drafts, engine.core.live.running[1]
    drafts._until[other.req_idx] = drafts._num_guessed[other.req_idx] = 0
    drafts._longest = 99             # nobody guesses at the second, whatever it says
    for size in range(1, 17):
        engine.core.clock.decodes.measured(size, step_us)
    assert set(engine.rows_of(engine.plan())) == {1, 2}
    engine.now_ns += 39_000_000
    assert (engine.core.next_timer_ns is None) == (num_plans == 1)
    engine.plan()
    assert len(engine.plans) == num_plans
    assert num_plans == 1 or set(engine.rows_of(engine.plans[1])) == {2}


def test_every_row_starts_afresh():
    """A row's next request inherits nothing of what its last one said."""
    engine = speculating(30, max_tokens=8, max_num_seqs=1)
    engine.run()
    engine.add(2, [100 + (3 * i) % 7 for i in range(3)], max_tokens=20)
    engine.step(token=400)
    assert drafts_of(engine.plan()) == [[]]
