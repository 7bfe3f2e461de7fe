"""The core's end of the channel to one frontend incarnation, and the ledger of its streams.

Owned by ``EngineCore``.  Every message carries ``channel_seq``; a stream that has ended is
kept until its frontend has acknowledged the message that said so (else a minute), so that a
frontend which missed a message is given everything again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from core_proc.logprob_store import LogprobStore, widened
from core_proc.request import NEVER, Request
from protocol.codec import f32_bytes, i32_bytes
from protocol.messages import EventKind, Finish, Heartbeat, Outputs, StreamPromptLogprobs, Sync
from protocol.steps import LogprobRows

HEARTBEAT_NS = 1_000_000_000
FORGET_NS = 60_000_000_000
Column = np.ndarray | list[int]


class Channel:
    """Messages out are collected in ``outbox`` until the process takes them."""

    def __init__(self, index: int, routing_id: bytes, now_ns: int) -> None:
        self.index, self.routing_id = index, routing_id
        self.outbox: list[Any] = []
        self.streams: dict[int, Request] = {}                    # live, and ended but not acknowledged
        self._ended: dict[int, tuple[int, int]] = {}             # stream → (channel_seq that said so, when)
        self._events: list[tuple[int, EventKind, int]] = []      # for the next Outputs
        self._sent_seq = self._received_seq = 0
        self._sent_ns = now_ns
        self._owes_heartbeat = False

    def send(self, kind: type, now_ns: int, **fields: Any) -> None:
        self._sent_seq += 1
        self._sent_ns = now_ns
        self.outbox.append(kind(channel_seq=self._sent_seq, **fields))

    def received(self, message: Any, now_ns: int) -> None:
        """Count a message in; after a gap say what we know, and the frontend adds the rest again."""
        gap = message.channel_seq > self._received_seq + 1
        self._received_seq = max(self._received_seq, message.channel_seq)
        if isinstance(message, Heartbeat):
            self._forget(lambda seq, _when: seq <= message.received_seq)
            self._owes_heartbeat |= message.received_seq < self._sent_seq      # it may have lost the last one
        else:
            self._owes_heartbeat = True
        if gap:
            self.sync(now_ns)

    def sync(self, now_ns: int) -> None:
        """Tell which streams are known; the frontend adds the others again, and its aborts that were lost."""
        have = i32_bytes([value for stream, request in self.streams.items() for value in (stream, request.sent_tokens)])
        self.send(Sync, now_ns, have=have, received_seq=self._received_seq)

    def tick(self, now_ns: int) -> None:
        """Acknowledge in silence; forget what nobody has asked for in a minute."""
        self._forget(lambda _seq, when: now_ns - when > FORGET_NS)
        if (self._owes_heartbeat or self.streams) and now_ns - self._sent_ns >= HEARTBEAT_NS:
            self.send(Heartbeat, now_ns, sent_seq=self._sent_seq + 1, received_seq=self._received_seq)
            self._owes_heartbeat = False

    def event(self, request: Request, kind: EventKind, now_ns: int) -> None:
        self._events.append((request.stream, kind, now_ns))

    def outputs(self, requests: list[Request], now_ns: int,
                prompt_logprobs: list[tuple[int, int, LogprobStore, int, int]] | None = None) -> None:
        """The unsent tokens of requests that are not running, and how they ended."""
        tokens = [r.token_ids[r.sent_tokens:] for r in requests]
        cached = [r.num_cached_tokens if r.sent_tokens == r.prompt_len or r.finish else -1 for r in requests]
        self.send_columns(
            requests, now_ns, stream=[r.stream for r in requests], offset=[r.sent_tokens - r.prompt_len for r in requests],
            count=[len(own) for own in tokens], token_ids=np.concatenate(tokens), finish=bytes([r.finish for r in requests]),
            stop_token=i32_bytes([r.stop_token for r in requests]), cached=cached if max(cached) >= 0 else None,
            prompt_logprobs=prompt_logprobs)
        for request in requests:
            request.sent_tokens = request.num_tokens
            if request.emit_at != NEVER:
                request.emit_at = request.num_tokens + request.stream_interval
            if request.finish is not Finish.NONE:
                self._ended[request.stream] = (self._sent_seq, now_ns)

    def send_columns(self, requests: list[Request], now_ns: int, *, stream: Column, offset: Column, count: Column,
                     token_ids: np.ndarray, finish: bytes, stop_token: bytes, cached: list[int] | None,
                     prompt_logprobs: list[tuple[int, int, LogprobStore, int, int]] | None = None) -> None:
        """One Outputs; ``requests``: those with logprobs among them, at least, in the columns' order."""
        logprobs = None
        if any(r.logprobs is not None for r in requests):
            logprobs = _logprob_rows({r.stream: r for r in requests}, stream, offset, count)
        events, self._events = self._events, []
        self.send(Outputs, now_ns, stream=i32_bytes(stream), offset=i32_bytes(offset), count=i32_bytes(count),
                  token_ids=i32_bytes(token_ids), finish=finish, stop_token=stop_token, logprobs=logprobs,
                  prompt_logprobs=_prompt_rows(prompt_logprobs) if prompt_logprobs else None,
                  cached_tokens=None if cached is None else i32_bytes(cached), events=events or None)

    def _forget(self, is_due: Any) -> None:
        for stream, (seq, when) in list(self._ended.items()):
            if is_due(seq, when):
                del self._ended[stream]
                self.streams.pop(stream, None)


def _logprob_rows(requests: dict[int, Request], stream: Column, offset: Column, count: Column) -> LogprobRows:
    """Rows as the token ids of all streams; a stream without logprobs has rows of id -1."""
    width = max(r.logprobs.width for r in requests.values() if r.logprobs is not None)
    parts = []
    for s, start, n in zip(*(np.asarray(column).tolist() for column in (stream, offset, count)), strict=True):
        store = requests[s].logprobs if s in requests else None
        if store is None:
            parts.append((np.full((n, width), -1, np.int32), np.zeros((n, width), np.float32), np.zeros(n, np.int32)))
        else:
            ids, values, ranks = store.rows(start, start + n)
            parts.append((*widened(ids, values, width), ranks))
    ids, values, ranks = (np.concatenate(column) for column in zip(*parts, strict=True))
    return LogprobRows(width, i32_bytes(ids), f32_bytes(values), i32_bytes(ranks))


def _prompt_rows(parts: list[tuple[int, int, LogprobStore, int, int]]) -> StreamPromptLogprobs:
    """From (stream, first position, store, first row, end row)."""
    width = max(store.width for _, _, store, _, _ in parts)
    columns = []
    for _stream, _position, store, start, end in parts:
        ids, values, ranks = store.rows(start, end)
        columns.append((*widened(ids, values, width), ranks))
    ids, values, ranks = (np.concatenate(column) for column in zip(*columns, strict=True))
    return StreamPromptLogprobs(
        i32_bytes([p[0] for p in parts]), i32_bytes([p[1] for p in parts]), i32_bytes([p[4] - p[3] for p in parts]),
        width, i32_bytes(ids), f32_bytes(values), i32_bytes(ranks))
