"""When a stream's tokens and events leave the core, and how a frontend that missed some gets them."""

import numpy as np

from core_harness import Harness
from protocol.codec import i32_bytes, i32_column
from protocol.messages import EventKind, Finish, Heartbeat, Outputs, Sync
from protocol.steps import PromptLogprobRows


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


def test_prompt_logprobs_of_a_preempted_request():
    """The step that brings them may bring its end too."""
    engine = Harness(window=2)
    request = engine.add(1, 4, max_tokens=1, prompt_logprobs=0)
    engine.plan()
    engine.core.live.preempt(request)
    rows = i32_bytes([7, 8, 9])
    engine.answer(prompt_logprobs=PromptLogprobRows(i32_bytes([0]), i32_bytes([1]), i32_bytes([3]), 1, rows, bytes(12), rows))
    assert engine.outputs(1) == ([104], Finish.LENGTH)
    told = [m.prompt_logprobs for m in engine.messages if isinstance(m, Outputs) and m.prompt_logprobs is not None]
    assert [(m.stream, m.start, m.ids) for m in told] == [(i32_bytes([16]), i32_bytes([1]), rows)]


def ask_again(engine: Harness, number: int, have: int) -> list[Outputs]:
    """What a frontend that holds ``have`` tokens is told after a gap."""
    engine.core.take_outputs()
    engine.tell(Sync, have=i32_bytes([number * 16, have]), received_seq=0)
    return [message for _, message in engine.core.take_outputs() if isinstance(message, Outputs)]


def columns(outputs: Outputs) -> tuple[list[int], list[int], list[int]]:
    return tuple(i32_column(column).tolist() for column in (outputs.stream, outputs.offset, outputs.token_ids))


def test_a_running_stream_is_told_again_at_once():
    engine = Harness()
    engine.add(1, 4, max_tokens=9)
    for _ in range(3):
        engine.step()
    again, = ask_again(engine, 1, 1)
    assert columns(again) == ([16], [1], [105, 106])
    assert ask_again(engine, 1, 3) == []       # it has them all
    engine.step()
    (_, following), = engine.core.take_outputs()
    assert columns(following) == ([16], [3], [107])


def test_a_waiting_and_an_ended_stream_are_told_again():
    engine = Harness()
    request = engine.add(1, 4, max_tokens=3)
    engine.step()
    engine.core.live.preempt(request)
    again, = ask_again(engine, 1, 0)
    assert columns(again) == ([16], [0], [104]) and again.finish == bytes([Finish.NONE])
    engine.run()
    again, = ask_again(engine, 1, 1)
    assert columns(again) == ([16], [1], [105, 106]) and again.finish == bytes([Finish.LENGTH])


def test_a_silent_stream_stays_silent_until_its_end():
    engine = Harness()
    request = engine.add(1, 4, max_tokens=5, final=True)
    engine.step(), engine.step()
    assert ask_again(engine, 1, 0) == []
    engine.step()
    engine.core.live.preempt(request)
    assert ask_again(engine, 1, 0) == []
    engine.step(), engine.step()
    (_, end), = engine.core.take_outputs()
    assert columns(end) == ([16], [0], [104, 105, 106, 107, 108]) and end.finish == bytes([Finish.LENGTH])


def test_a_frontend_cannot_have_more_than_there_is():
    engine = Harness()
    engine.add(1, 4, max_tokens=3)
    engine.step()
    assert ask_again(engine, 1, 7) == []
    assert ask_again(engine, 1, -7)[0].offset == i32_bytes([0])


def test_prompt_logprobs_are_told_again():
    """Of a running stream as of one that has ended, and of one that says no token before its end."""
    engine = Harness()
    for number in (1, 2):
        request = engine.add(number, 4, max_tokens=3, final=number == 2, prompt_logprobs=0)
        request.prompt_logprobs.append(np.array([[7], [8], [9]], np.int32), np.zeros((3, 1), np.float32), np.ones(3, np.int32))
    engine.step()
    for _ in range(2):
        for number in (1, 2):
            rows = ask_again(engine, number, 1)[0].prompt_logprobs
            assert (rows.stream, rows.start, rows.ids) == (i32_bytes([number * 16]), i32_bytes([1]), i32_bytes([7, 8, 9]))
        engine.run()


def test_a_lost_last_message_is_followed_until_the_frontend_has_heard():
    """What is lost may be the answer to a gap, for streams that the core does not know."""
    engine = Harness()
    engine.core.take_outputs()
    engine.seq += 1                            # an Add that the core never sees
    engine.tell(Heartbeat, sent_seq=2, received_seq=1)
    assert [type(m) for _, m in engine.core.take_outputs()] == [Sync]          # and that is lost too

    def second() -> list[Heartbeat]:
        engine.now_ns += 10**9
        engine.core.tick(engine.now_ns)
        return [m for _, m in engine.core.take_outputs()]

    heard = 1
    for _ in range(3):
        engine.tell(Heartbeat, sent_seq=engine.seq, received_seq=heard)
        (heartbeat,) = second()
        assert isinstance(heartbeat, Heartbeat)
    heard = heartbeat.channel_seq              # at last
    engine.tell(Heartbeat, sent_seq=engine.seq, received_seq=heard)
    assert second() == []
