"""A frontend that believes nothing: the real channel to the core, and a ledger that judges.

``EngineClient`` is the product's own; frames in both directions get lost now and then.  Tokens
come in order, never change, and each stream ends exactly once.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from frontend.engine_client import EngineClient
from frontend.session import StreamOutput
from protocol.codec import i32_bytes
from protocol.messages import EventKind, Finish, OutputKind
from protocol.transport import Sent
from simulation.reference import LogprobRow, Wish


class Lane:
    """Frames in order; some never arrive, but for the first."""

    def __init__(self, rng: random.Random, loss: float) -> None:
        self.rng, self.loss = rng, loss
        self.frames: deque[bytes] = deque()
        self._begun = False

    def put(self, frame: bytes) -> None:
        if not self._begun or self.rng.random() >= self.loss:
            self.frames.append(frame)
        self._begun = True

    def take(self, limit: int = 64) -> list[bytes]:
        return [self.frames.popleft() for _ in range(min(limit, len(self.frames)))]


class LossyLink:
    """What ``EngineClient`` sends and receives with."""

    def __init__(self, rng: random.Random, loss: float) -> None:
        self.loss = loss
        self.to_core, self.to_frontend = Lane(rng, loss), Lane(rng, loss)

    def send(self, frame: bytes) -> Sent:
        self.to_core.put(frame)
        return Sent.OK

    def receive(self, limit: int = 64) -> list[bytes]:
        return self.to_frontend.take(limit)


class Stream:
    """One child request: what ``EngineClient.add`` reads of a request and of its child, and what came."""

    client, request_hash = b"c", b""

    def __init__(self, wish: Wish, stream: int, arrival_ns: int) -> None:
        self.wish, self.stream, self.arrival_ns = wish, stream, arrival_ns
        self.core_key, self.index, self.attach_no = wish.key, wish.child, wish.attach_no
        self.seed, self.priority, self.cache_salt, self.params = wish.seed, wish.priority, wish.cache_salt, wish.params
        self.prompt_ids, self.core_output = i32_bytes(wish.prompt), (wish.kind, wish.interval)
        self.token_ids = array("i", wish.forced)
        self.logprobs: list[LogprobRow] = []
        self.prompt_logprobs: list[LogprobRow] = []
        self.events: Counter[EventKind] = Counter()
        self.finish = Finish.NONE
        self.stop_token = -1
        self.cached_tokens = -1
        self.refusal: tuple[str, str] | None = None      # code, message
        self.num_outputs = 0

    @property
    def is_open(self) -> bool:
        return self.finish is Finish.NONE and self.refusal is None

    @property
    def lacks_prompt_rows(self) -> bool:
        return self.wish.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.wish.prompt) - 1


class FakeFrontend:
    """``EngineClient`` with this as its session."""

    def __init__(self, routing_id: bytes, rng: random.Random, loss: float) -> None:
        self.routing_id, self.link = routing_id, LossyLink(rng, loss)
        self.client = EngineClient(self.link, routing_id, 1)
        self.open: dict[int, Stream] = {}

    def add(self, stream: Stream) -> None:
        self.open[stream.stream] = stream
        self.client.add(stream, stream)

    def abort(self, stream: Stream, all_children: bool) -> list[Stream]:
        """Ends it here at once; the streams that ended."""
        ended = [s for s in self.open.values() if s is stream or (all_children and s.core_key == stream.core_key)]
        for other in ended:
            other.finish = Finish.ABORT
            del self.open[other.stream]
        self.client.abort(stream, None if all_children else stream)
        return ended

    def abort_as_older_attach(self, stream: Stream) -> None:
        """Of somebody whose stream has moved: to be ignored."""
        older = Stream(replace(stream.wish, attach_no=stream.attach_no - 1), stream.stream, 0)
        self.client.abort(older, older)

    def hear(self) -> None:
        self.client.receive(self)

    def tick(self) -> None:
        """After a silent second."""
        self.client.tick(math.inf)

    # --- what EngineClient asks of a session ---

    def accept(self, stream: int) -> None:
        pass     # outputs say so too

    def reject(self, stream: int, code: str, field: str, message: str) -> None:
        if stream in self.open:
            self.open.pop(stream).refusal = code, f"{field}: {message}"

    def event(self, stream: int, kind: EventKind, _time_ns: int) -> None:
        if stream in self.open:
            self.open[stream].events[kind] += 1

    def prompt_rows(self, stream: int, start: int, ids: np.ndarray, values: np.ndarray, ranks: np.ndarray) -> None:
        entry = self.open.get(stream)
        if entry is not None:
            known = 1 + len(entry.prompt_logprobs) - start
            if known >= 0:
                entry.prompt_logprobs += _rows(ids, values, ranks, entry.wish.prompt_logprobs)[known:]

    def output(self, out: StreamOutput) -> bool:
        stream = self.open.get(out.stream)
        if stream is None:
            return True
        tokens = stream.token_ids
        if out.offset > len(tokens) or (out.token_ids and stream.lacks_prompt_rows):
            return False
        again = list(tokens[out.offset:out.offset + len(out.token_ids)])
        assert again == out.token_ids[:len(again)], f"stream {out.stream}: tokens changed"
        new = out.token_ids[len(again):]
        tokens.extend(new)
        self._check_pace(stream, out, len(new))
        if stream.wish.logprobs is not None and new:
            stream.logprobs += _rows(*(column[len(again):] for column in out.logprobs), stream.wish.logprobs)
        if out.cached_tokens >= 0:
            assert self.link.loss or stream.cached_tokens in (-1, out.cached_tokens), "cached tokens changed"
            stream.cached_tokens = out.cached_tokens
        if out.finish is not Finish.NONE:
            stream.finish, stream.stop_token = out.finish, out.stop_token
            del self.open[out.stream]
        return True

    def streams(self) -> Iterator[tuple[int, int]]:
        return ((number, len(stream.token_ids)) for number, stream in self.open.items())

    def resubmit_unknown(self, known_to_core: set[int]) -> None:
        for number, stream in list(self.open.items()):
            if number not in known_to_core:
                self.client.add(stream, stream)

    def _check_pace(self, stream: Stream, out: StreamOutput, num_new: int) -> None:
        """Tokens come when they were asked for, as long as nothing has to be told again."""
        if not self.link.loss and out.finish is Finish.NONE:
            assert num_new and num_new == len(out.token_ids), "an Outputs without anything new"
            assert stream.wish.kind is OutputKind.DELTA, "tokens of a stream that wants them at its end"
            assert num_new >= (stream.wish.interval if stream.num_outputs else 1), "more often than asked for"
        stream.num_outputs += 1


def _rows(ids: np.ndarray, values: np.ndarray, ranks: np.ndarray, num_best: int) -> list[LogprobRow]:
    """As many columns as were asked for; the message is as wide as its widest stream."""
    width = num_best + 1
    return list(zip(ids[:, :width].tolist(), values[:, :width].tolist(), ranks.tolist(), strict=True))
