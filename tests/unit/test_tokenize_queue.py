"""Requests before they are token ids: order, the thread for long ones, leaving early."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator

import pytest

from frontend.tokenize_queue import LONG_PROMPT_CHARS, Arrival, TokenizeQueue
from frontend_fakes import generate, resolved
from protocol.messages import ChatMessage, Generate
from protocol.sampling_params import BadRequest, TokenParams

LONG = "x" * (LONG_PROMPT_CHARS + 1)


class Work:
    """A queue whose tokenizing can be held up."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.threads: list[str] = []
        self.queue = TokenizeQueue(self.prepare)

    def prepare(self, message: Generate) -> tuple[bytes, TokenParams]:
        self.threads.append(threading.current_thread().name)
        assert self.go.wait(30)
        if message.text == "bad":
            raise BadRequest("prompt", "was bad")
        if message.text == "broken":
            raise RecursionError("deep inside a library")
        return b"", resolved(message)

    def put(self, key: int, text: str = "short", client: bytes = b"c") -> None:
        self.queue.put(Arrival(client, generate(key, text=text), key, b""))

    def results(self) -> dict[int, object]:
        return {arrival.generate.key[0]: result for arrival, result in self.queue.turn()}

    def from_thread(self) -> dict[int, object]:
        assert select.select([self.queue.wake_fd], [], [], 30)[0]
        return self.results()


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    work.go.set()
    work.queue.close()


def everything(work: Work) -> dict[int, object]:
    found = {}
    while work.queue.due:
        found |= work.results()
    return found


def test_short_ones_come_in_order_on_this_thread(work: Work) -> None:
    for key in (3, 1, 2):
        work.put(key)
    assert list(everything(work)) == [3, 1, 2] and set(work.threads) == {threading.current_thread().name}


def test_a_turn_ends_when_its_time_is_up(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("frontend.tokenize_queue.time.monotonic", lambda: next(clock) * 0.0006)
    for key in range(1, 6):
        work.put(key)
    assert list(work.results()) == [1] and work.queue.due      # the second look at the clock says 1.2 ms


def test_a_long_one_is_beside_and_does_not_hold_up_the_others(work: Work) -> None:
    work.go.clear()
    work.put(1, LONG)
    assert everything(work) == {} and not work.queue.due
    conversation = [ChatMessage("user", LONG)]
    work.queue.put(Arrival(b"c", Generate(b"\x03" * 16, None, None, conversation, generate().params), 3, b""))
    assert everything(work) == {}              # a long conversation is long too
    work.go.set()
    found = work.from_thread()
    while len(found) < 2:
        found |= work.from_thread()
    assert list(found) == [1, 3] and all("tokenize" in name for name in work.threads)


@pytest.mark.parametrize(("text", "code"), [("bad", "invalid_value"), ("broken", "internal")])
def test_what_fails_fails_alone(work: Work, text: str, code: str) -> None:
    work.put(1, text)
    work.put(2)
    found = everything(work)
    assert isinstance(found[1], BadRequest) and found[1].code == code
    assert not isinstance(found[2], BadRequest)


def test_a_cancelled_one_is_never_seen_again(work: Work) -> None:
    work.go.clear()
    work.put(1, LONG)
    everything(work)
    work.put(2)
    work.put(3, client=b"other")
    assert work.queue.holds(b"c", generate(1).key) and work.queue.holds(b"c", generate(2).key)
    assert [a.generate.key[0] for a in work.queue.cancel(b"c", generate(1).key)] == [1]
    assert [a.generate.key[0] for a in work.queue.cancel(b"c")] == [2]
    assert not work.queue.holds(b"c", generate(1).key)
    work.go.set()
    assert list(everything(work) | work.from_thread()) == [3]


def test_cancelling_all_names_them_all(work: Work) -> None:
    work.put(1)
    work.put(2, client=b"other")
    assert [a.client for a in work.queue.cancel_all()] == [b"c", b"other"]
    assert everything(work) == {}
