"""When the next plan goes out: shortly before the step under way is predicted to end."""

import random
from types import SimpleNamespace

import pytest

from core_harness import Harness
from core_proc import process as core_process
from core_proc.process import CoreProcess
from core_proc.step_clock import FORGOTTEN_AFTER, Curve
from protocol.steps import StepStatus

MS = 1_000_000               # ns


def curve(*points: tuple[int, int]) -> Curve:
    found = Curve()
    for size, time_us in points:
        found.measured(size, time_us)
    return found


def test_curve_knows_nothing_at_first():
    assert Curve().at(5) is None
    assert Curve().at(0) == 0.0


def test_curve_between_below_and_beyond_what_was_measured():
    found = curve((8, 10_000), (64, 24_000))
    assert [found.at(size) for size in (1, 8, 36, 64, 128)] == [10_000, 10_000, 17_000, 24_000, 40_000]
    assert curve((8, 10_000)).at(16) == 20_000


def test_the_largest_size_within_a_time():
    assert Curve().largest_within(5) is None
    found = curve((8, 10_000), (64, 24_000))
    sizes = [found.largest_within(us) for us in (-5, 0, 2_500, 10_000, 17_000, 24_000, 29_000, 10**9)]
    assert sizes == [0, 0, 2, 8, 36, 65, 84, 128]
    assert [curve((1, 13_000)).largest_within(us) for us in (12_000, 13_000, 20_000, 10**6)] == [0, 2, 2, 2]


def test_a_disturbed_step_moves_nothing():
    found = curve(*[(64, 20_000)] * 4, (64, 900_000), (64, 20_000))
    assert found.at(64) == 20_000
    assert curve((4, 10_000), (64, 9_000_000)).at(64) == 1.5 * 16 * 10_000      # a single one has to be credible
    assert curve((4, 10_000), (64, 9_000_000), (64, 9_000_000)).at(64) == 9_000_000


def test_the_curve_follows_and_forgets():
    found = curve(*[(4, 10_000)] * 5, *[(64, 20_000)] * 5, *[(64, 50_000)] * 3)
    assert found.at(64) == 50_000
    for _ in range(FORGOTTEN_AFTER + 1):
        found.measured(64, 60_000)
    assert found.at(4) == 60_000             # what 4 took is long ago


def test_noise_of_a_third_gives_predictions_within_a_fifth():
    rng, found = random.Random(0), Curve()
    for _ in range(300):
        size = rng.randint(1, 80)
        found.measured(size, int((15_000 + 700 * size) * rng.uniform(0.85, 1.15) * (5 if rng.random() < 0.05 else 1)))
    for size in (1, 12, 24, 48, 80):
        assert found.at(size) == pytest.approx(15_000 + 700 * size, rel=0.2)


def trained(step_us: int = 50_000, steps: int = 6, **config) -> Harness:
    """An engine whose worker has told that a decode takes ``step_us``; nothing is in flight."""
    engine = Harness(max_model_len=512, num_blocks=256, **config)
    engine.add(1, 4, max_tokens=400)
    for _ in range(steps):
        engine.plan()
        engine.answer(took_us=step_us)
    return engine


def test_the_second_plan_waits_until_the_first_is_about_to_end():
    engine = trained(50_000)
    engine.plan()
    sent_ns = engine.now_ns
    assert engine.plan() is None and len(engine.plans) == 1
    assert engine.core.next_timer_ns == sent_ns + 45 * MS           # a tenth of the step before its end
    engine.now_ns = sent_ns + 45 * MS - 2
    assert engine.plan() is None
    assert engine.plan() is not None
    assert engine.core.next_timer_ns is None                        # the window is full


def test_short_steps_get_their_successor_at_once():
    engine = trained(1_900)
    assert engine.plan() and engine.plan() and not engine.plan()


def test_the_lead_is_two_milliseconds_at_least():
    engine = trained(10_000)
    engine.plan()
    assert engine.core.next_timer_ns == engine.now_ns + 8 * MS


def test_the_clock_of_a_queued_step_starts_with_the_result_before_it():
    engine = trained(50_000)
    engine.plan()
    engine.now_ns += 46 * MS
    engine.plan()
    engine.now_ns += 10 * MS            # the first ends later than predicted
    engine.answer(took_us=50_000)
    assert engine.core.next_timer_ns == engine.now_ns + 45 * MS


def test_a_request_that_comes_meanwhile_is_in_the_next_plan():
    engine = trained(50_000)
    engine.plan()
    engine.now_ns += 40 * MS
    engine.add(2, 4)
    assert engine.plan() is None
    engine.now_ns += 5 * MS
    assert set(engine.rows_of(engine.plan())) == {1, 2}


def test_without_timings_plans_go_out_as_early_as_the_window_allows():
    engine = Harness()
    engine.add(1, 4)
    assert engine.plan() and engine.core.next_timer_ns == 0 and engine.plan()


def test_window_1_never_looks_at_the_clock():
    engine = trained(50_000, window=1)
    engine.plan()
    assert engine.core.next_timer_ns is None
    engine.now_ns += 1000 * MS
    assert engine.plan() is None


def test_no_timer_while_nothing_can_be_planned():
    """Else the loop would ask again and again until the result comes."""
    engine = trained(50_000)
    engine.add(2, 4, max_tokens=1)
    engine.abort(1)
    engine.plan()                       # all of request 2
    engine.now_ns += 60 * MS
    assert engine.core.wants_plan(engine.now_ns) and engine.core.schedule(engine.now_ns) is None
    assert engine.core.next_timer_ns is None and not engine.core.wants_plan(engine.now_ns)
    engine.add(3, 4)
    assert set(engine.rows_of(engine.plan())) == {3}


def test_after_a_failed_step_the_next_plan_goes_out_at_once():
    engine = trained(50_000)
    engine.plan()
    engine.now_ns += 46 * MS
    engine.plan()
    engine.answer(StepStatus.FAILED_MEMORY)
    plan = engine.plan() or pytest.fail("the skipped one is not waited for")
    assert plan.restart_after is not None


@pytest.mark.parametrize(("timer_ns", "sleep_ms"), [(None, 500), (MS // 100, 1), (3 * MS + 1, 4), (-5 * MS, 0), (900 * MS, 500)])
def test_the_loop_sleeps_until_the_timer_and_never_too_short(monkeypatch, timer_ns, sleep_ms):
    monkeypatch.setattr(core_process, "time", SimpleNamespace(time_ns=lambda: 10**18, monotonic=lambda: 100.0))
    loop = CoreProcess.__new__(CoreProcess)
    loop.unsent, loop.unsent_plans, loop.next_tick_s = {}, [], 100.5
    loop.core = SimpleNamespace(next_timer_ns=None if timer_ns is None else 10**18 + timer_ns)
    assert loop._sleep_ms() == sleep_ms
