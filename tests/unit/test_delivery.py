"""When a stream's tokens and events leave the core, and how a frontend that missed some gets them."""

from core_harness import Harness
from protocol.messages import EventKind, Finish, Outputs


def events_of(engine: Harness, number: int) -> list[EventKind]:
    """Of one stream, so far."""
    engine.outputs(number)
    return [kind for message in engine.messages if isinstance(message, Outputs)
            for stream, kind, _ in message.events or () if stream == number * 16]


def test_a_late_token_does_not_wait_for_its_preempted_request():
    engine = Harness(window=2)
    request = engine.add(1, 4, max_tokens=3)
    engine.plan()
    engine.core.live.preempt(request)
    engine.answer()
    assert engine.outputs(1) == ([104], Finish.NONE)
    assert events_of(engine, 1) == [EventKind.ADMITTED, EventKind.FIRST_TOKEN]
    engine.run()
    assert engine.outputs(1) == ([104, 105, 106], Finish.LENGTH)
    assert events_of(engine, 1) == [EventKind.ADMITTED, EventKind.FIRST_TOKEN, EventKind.ADMITTED]


def test_a_late_token_comes_no_sooner_than_asked_for():
    engine = Harness(window=2)
    request = engine.add(1, 4, max_tokens=3, final=True)
    engine.plan()
    engine.core.live.preempt(request)
    engine.answer()
    assert engine.outputs(1) == ([], Finish.NONE)
    engine.run()
    assert engine.outputs(1) == ([104, 105, 106], Finish.LENGTH)


def test_the_end_on_a_late_token():
    engine = Harness(window=2)
    request = engine.add(1, 4, max_tokens=1)
    engine.plan()
    engine.core.live.preempt(request)
    engine.answer()
    assert engine.outputs(1) == ([104], Finish.LENGTH)
    assert events_of(engine, 1) == [EventKind.ADMITTED, EventKind.FIRST_TOKEN]
