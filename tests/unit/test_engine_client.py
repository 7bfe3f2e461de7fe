"""The channel to the core: numbers, gaps, full queues, columns."""

from __future__ import annotations

import time

import numpy as np
import pytest

from frontend.engine_client import HEARTBEAT_S, EngineClient, split_outputs
from frontend.session import Session
from frontend_fakes import (
    FakeDetokenizer, FakeLink, Mailbox, generate, ids, outputs, ready, resolved, rows, text_of,
)
from protocol.codec import ColumnError, i32_bytes
from protocol.messages import (
    Abort, Accepted, Add, Delta, Error, EventKind, Finish, Heartbeat, OutputKind, Rejected,
    StreamPromptLogprobs, Sync,
)
from protocol.steps import Hello, LogprobRows

PROMPT = i32_bytes([1, 2, 3])


class Channel:
    """An engine client and its ledger on a fake link."""

    def __init__(self) -> None:
        self.link, self.box = FakeLink(), Mailbox()
        self.core = EngineClient(self.link, b"f0.e1", 4)
        self.session = Session(self.core, FakeDetokenizer, text_of, lambda: "fp")

    def start(self) -> None:
        self.hear(ready(1))
        self.link.messages()

    def hear(self, *messages) -> None:
        for message in messages:
            self.link.say(message)
        self.core.receive(self.session)

    def open(self, key: int = 1, **options):
        message = generate(key, **options)
        return self.session.open(b"client", message, PROMPT, resolved(message), seed=9, arrival_ns=5,
                                 request_hash=b"h")

    def deltas(self, kind: type = Delta) -> list:
        self.session.flush(self.box, time.time_ns())
        return self.box.take(kind)


@pytest.fixture
def channel() -> Channel:
    return Channel()


def test_hello_comes_first_with_the_epoch_it_was_told(channel: Channel) -> None:
    hello, = channel.link.messages()
    assert isinstance(hello, Hello) and (hello.role, hello.routing_id, hello.epoch) == ("frontend", b"f0.e1", 4)


def test_ready_is_kept_and_replaced_by_a_newer_one(channel: Channel) -> None:
    assert channel.core.ready is None
    channel.hear(ready(1))
    first = channel.core.ready
    channel.hear(ready(2))
    assert first is not None and channel.core.ready is not first


def test_every_message_carries_the_next_number(channel: Channel) -> None:
    channel.start()
    request = channel.open(n=2, temperature=0.5, output_kind=OutputKind.FINAL)
    channel.session.abort(b"client", request.key, 0)
    add0, add1, abort = channel.link.messages()
    assert [m.channel_seq for m in (add0, add1, abort)] == [1, 2, 3]
    assert isinstance(add0, Add) and isinstance(abort, Abort)
    assert (add0.key, add0.child, add1.child, add0.prompt_ids) == (request.core_key, 0, 1, PROMPT)
    assert (add0.params.temperature, add0.seed, add0.output_kind) == (0.5, 9, OutputKind.FINAL)
    assert add0.stream != add1.stream and add0.output_ids == b"" and not add0.resubmitted
    assert (abort.key, abort.child, abort.fe_epoch, abort.attach_no) == (request.core_key, None, 4, 0)


def test_a_full_queue_keeps_the_order(channel: Channel) -> None:
    channel.start()
    channel.link.full = True
    first, second = channel.open(1), channel.open(2)
    assert channel.core.unsent and channel.link.messages() == []
    channel.link.full = False
    channel.core.tick(time.monotonic())
    adds = [m for m in channel.link.messages() if isinstance(m, Add)]
    assert [m.key for m in adds] == [first.core_key, second.core_key] and not channel.core.unsent


def test_heartbeat_after_a_silent_second_only(channel: Channel) -> None:
    channel.core.tick(time.monotonic())
    assert [type(m) for m in channel.link.messages()] == [Hello]     # not before the engine is ready
    channel.hear(ready(1))
    channel.core.tick(time.monotonic() + HEARTBEAT_S)
    beat, = channel.link.messages()
    assert isinstance(beat, Heartbeat)
    assert (beat.channel_seq, beat.sent_seq, beat.received_seq) == (1, 1, 1)
    channel.open()
    channel.link.messages()
    channel.core.tick(time.monotonic())
    assert channel.link.messages() == []


def test_outputs_become_each_streams_deltas(channel: Channel) -> None:
    channel.start()
    a, b = channel.open(1).children[0], channel.open(2, logprobs=1).children[0]
    columns = rows([1, 2, 3], 3)
    logprobs = LogprobRows(3, *(c.tobytes() for c in columns))
    channel.hear(Accepted(2, a.stream), outputs(
        3, (b.stream, 0, [1, 2]), (a.stream, 0, [3], Finish.LENGTH), logprobs=logprobs,
        cached_tokens=i32_bytes([-1, 2]), events=[(a.stream, EventKind.FIRST_TOKEN, 10)]))
    by_key = {delta.key[0]: delta for delta in channel.deltas()}
    assert ids(by_key[1].token_ids) == [3] and by_key[1].usage.cached_tokens == 2
    assert by_key[1].logprobs is None and by_key[1].metrics.time_to_first_token_s == 5e-9
    assert ids(by_key[2].token_ids) == [1, 2] and by_key[2].logprobs.width == 2
    assert np.frombuffer(by_key[2].logprobs.values, "<f4").tolist() == columns[1][:2, :2].ravel().tolist()
    assert ids(by_key[2].logprobs.ranks) == columns[2][:2].tolist()


def test_prompt_logprobs_of_a_stream_that_ends_in_the_same_message(channel: Channel) -> None:
    channel.start()
    child = channel.open(prompt_logprobs=0).children[0]
    columns = rows([2, 3], 1)
    part = StreamPromptLogprobs(i32_bytes([child.stream]), i32_bytes([1]), i32_bytes([2]), 1,
                                *(c.tobytes() for c in columns))
    channel.hear(outputs(2, (child.stream, 0, [7], Finish.LENGTH), prompt_logprobs=part))
    delta, = channel.deltas()
    assert ids(delta.prompt_logprobs.ids) == [2, 3] and delta.usage is not None


def test_a_rejection_reaches_its_client(channel: Channel) -> None:
    channel.start()
    channel.hear(Rejected(2, channel.open().children[0].stream, "overloaded", "", "10000 requests wait"))
    error, = channel.deltas(Error)
    assert (error.code, error.message) == ("overloaded", "10000 requests wait")


def test_a_gap_in_the_numbers_asks_for_what_is_missing(channel: Channel) -> None:
    channel.start()
    child = channel.open().children[0]
    channel.hear(outputs(2, (child.stream, 0, [1, 2])))
    channel.link.messages()
    channel.hear(outputs(4, (child.stream, 5, [6])))          # number 3 with tokens 2 … 4 is lost
    sync, = channel.link.messages()
    assert isinstance(sync, Sync) and ids(sync.have) == [child.stream, 2]
    channel.hear(outputs(5, (child.stream, 2, [3, 4, 5, 6], Finish.LENGTH)))
    assert [t for d in channel.deltas() for t in ids(d.token_ids)] == [1, 2, 3, 4, 5, 6]
    assert channel.link.messages() == []


def test_tokens_missing_without_a_gap_in_the_numbers_ask_too(channel: Channel) -> None:
    channel.start()
    child = channel.open().children[0]
    channel.link.messages()
    channel.hear(outputs(2, (child.stream, 3, [4])))
    assert [type(m) for m in channel.link.messages()] == [Sync]


def test_a_lost_last_message_shows_by_the_heartbeat(channel: Channel) -> None:
    channel.start()
    channel.open()
    channel.link.messages()
    channel.hear(Heartbeat(3, 3, 1))                          # number 2 never came
    assert [type(m) for m in channel.link.messages()] == [Sync]


def test_the_cores_sync_brings_back_adds_and_aborts_it_never_got(channel: Channel) -> None:
    channel.start()
    known, lost, left = channel.open(1), channel.open(2), channel.open(3)
    channel.session.abort(b"client", left.key, 0)
    channel.link.messages()
    channel.hear(Sync(2, i32_bytes([known.children[0].stream, 0]), received_seq=5))
    add, abort = channel.link.messages()
    assert (add.key, abort.key) == (lost.core_key, left.core_key)
    channel.hear(Heartbeat(3, 3, received_seq=abort.channel_seq))     # now it has it
    channel.hear(Sync(4, i32_bytes([known.children[0].stream, 0, lost.children[0].stream, 0]), received_seq=abort.channel_seq))
    assert channel.link.messages() == []


def test_an_abort_that_is_under_way_is_not_sent_again(channel: Channel) -> None:
    """Else, where frames get lost, what is sent again makes gaps that make more be sent again."""
    channel.start()
    first, second = channel.open(1), channel.open(2)
    channel.session.abort(b"client", first.key, 0)
    channel.session.abort(b"client", second.key, 0)
    early, late = channel.link.messages()[-2:]
    channel.hear(Sync(2, b"", received_seq=early.channel_seq))
    again, = channel.link.messages()
    assert (again.key, again.channel_seq) == (first.core_key, late.channel_seq + 1)
    channel.hear(Sync(3, b"", received_seq=late.channel_seq))
    again, = channel.link.messages()
    assert again.key == second.core_key


def test_a_heartbeat_behind_a_gap_forgets_no_abort(channel: Channel) -> None:
    """What is missing may be the Sync that asked for it."""
    channel.start()
    request = channel.open()
    channel.session.abort(b"client", request.key, 0)
    abort = channel.link.messages()[-1]
    channel.hear(Heartbeat(3, 3, abort.channel_seq))
    assert [type(m) for m in channel.link.messages()] == [Sync]
    channel.hear(Sync(4, b"", received_seq=abort.channel_seq))
    assert [m.key for m in channel.link.messages()] == [request.core_key]


def test_a_readded_stream_carries_its_tokens(channel: Channel) -> None:
    channel.start()
    child = channel.open().children[0]
    channel.hear(outputs(2, (child.stream, 0, [1, 2])))
    channel.link.messages()
    channel.hear(Sync(3, b"", received_seq=2))
    add, = channel.link.messages()
    assert ids(add.output_ids) == [1, 2]


@pytest.mark.parametrize("frame", [b"", b"\x93", b"\x91\x63", b"\xc1" * 40])
def test_garbage_from_the_socket_disturbs_nothing(channel: Channel, frame: bytes) -> None:
    channel.start()
    child = channel.open().children[0]
    channel.link.incoming.append(frame)
    channel.hear(outputs(2, (child.stream, 0, [1])))
    assert len(channel.deltas()) == 1


def test_columns_that_contradict_each_other_are_refused_whole(channel: Channel) -> None:
    good = outputs(1, (1, 0, [5, 6]), (2, 0, [7]))
    assert [(o.stream, o.token_ids) for o in split_outputs(good)] == [(1, [5, 6]), (2, [7])]
    fields = {name: getattr(good, name) for name in good.__struct_fields__}
    for name, value in (("count", i32_bytes([2])), ("token_ids", i32_bytes([5])), ("finish", b"\x00"),
                        ("finish", b"\x00\xff"), ("offset", b"\x00"), ("stop_token", b""),
                        ("cached_tokens", i32_bytes([1])),
                        ("logprobs", LogprobRows(2, i32_bytes([1]), b"\0" * 24))):
        with pytest.raises(ColumnError):
            list(split_outputs(type(good)(**(fields | {name: value}))))
