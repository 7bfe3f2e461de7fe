"""Requests between their arrival and their ledger entry: tokenized in order, a little a turn.

Owned by ``process``.  Short prompts are tokenized on the loop's own thread, about 1 ms a
turn; prompts of more than 20,000 characters on one thread beside it (the tokenizer lets go
of the interpreter), so one client's long prompt stalls nobody.  ``wake_fd`` becomes
readable when that thread has finished one.
"""

from __future__ import annotations

import logging
import os
import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from protocol.messages import Generate
from protocol.sampling_params import BadRequest, TokenParams

TURN_TOKENIZE_S = 0.001      # no further prompt is begun in this turn after this long
LONG_PROMPT_CHARS = 20_000

log = logging.getLogger(__name__)

Prepare = Callable[[Generate], tuple[bytes, TokenParams]]    # raises BadRequest


class Arrival(msgspec.Struct, eq=False):
    """A request that waits for its token ids."""

    client: bytes
    generate: Generate
    arrival_ns: int
    request_hash: bytes
    cancelled: bool = False


Result = tuple[bytes, TokenParams] | BadRequest


class TokenizeQueue:
    """First come, first tokenized; long ones beside the others."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self._waiting: deque[Arrival] = deque()
        self._long: set[Arrival] = set()                      # on the thread, or come back from it
        self._done: queue.SimpleQueue[tuple[Arrival, Result]] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, arrival: Arrival) -> None:
        self._waiting.append(arrival)

    def holds(self, client: bytes, key: bytes) -> bool:
        return any(a.client == client and a.generate.key == key for a in self._all())

    def cancel(self, client: bytes, key: bytes | None = None) -> list[Arrival]:
        """Forget one request of ``client``, or all (None); those that were waiting here."""
        found = [a for a in self._all() if a.client == client and key in (None, a.generate.key)]
        for arrival in found:
            arrival.cancelled = True
        return found

    def cancel_all(self) -> list[Arrival]:
        found = self._all()
        for arrival in found:
            arrival.cancelled = True
        return found

    @property
    def due(self) -> bool:
        """There is work for the next turn, announced by no file descriptor."""
        return bool(self._waiting)

    def turn(self) -> list[tuple[Arrival, Result]]:
        """What is ready now."""
        results = self._from_thread()
        started_s = time.monotonic()
        while self._waiting and time.monotonic() - started_s < TURN_TOKENIZE_S:
            arrival = self._waiting.popleft()
            if arrival.cancelled:
                continue
            if num_chars(arrival.generate) <= LONG_PROMPT_CHARS:
                results.append((arrival, self._run(arrival)))
            else:
                self._long.add(arrival)
                self._thread.submit(self._run_beside, arrival)
        return results

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _all(self) -> list[Arrival]:
        return [a for a in (*self._waiting, *self._long) if not a.cancelled]

    def _run(self, arrival: Arrival) -> Result:
        try:
            return self._prepare(arrival.generate)
        except BadRequest as error:
            return error
        except BaseException:      # of a library: a panic in Rust is no Exception; nobody else may suffer
            log.exception("a request could not be tokenized")
            return BadRequest("", "the prompt could not be tokenized", "internal")

    def _run_beside(self, arrival: Arrival) -> None:
        """On the thread."""
        self._done.put((arrival, self._run(arrival)))
        os.eventfd_write(self.wake_fd, 1)

    def _from_thread(self) -> list[tuple[Arrival, Result]]:
        try:
            os.eventfd_read(self.wake_fd)
        except BlockingIOError:
            return []
        results = []
        while not self._done.empty():
            arrival, result = self._done.get_nowait()
            self._long.discard(arrival)
            if not arrival.cancelled:
                results.append((arrival, result))
        return results


def num_chars(generate: Generate) -> int:
    """Characters to tokenize."""
    if generate.messages is not None:
        return sum(len(message.content) for message in generate.messages)
    return len(generate.text or "")
