"""The frontend's end of the channel to the core: numbered messages down, columns up.

Owned by ``process``.  Turns the ledger's wishes into Add and Abort, splits Outputs into
per-stream events for the ledger, and keeps the channel honest: every message carries
``channel_seq``, a gap is answered by Sync, a silent second by Heartbeat.  Nothing that a
full queue refused is lost: it waits here in order.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol

import msgspec
import numpy as np

from frontend.session import Session, StreamOutput
from frontend.streams import Child, OpenRequest
from protocol.codec import PROTOCOL_VERSION, ColumnError, Reject, Unsupported, f32_column, i32_bytes, i32_column
from protocol.messages import (
    Abort, Accepted, Add, EngineReady, EventKind, Finish, Heartbeat, Outputs, Rejected,
    StreamPromptLogprobs, Sync, to_core, to_frontend,
)
from protocol.steps import Hello, LogprobRows
from protocol.transport import Sent

HEARTBEAT_S = 1.0
FINISHES = {int(finish): finish for finish in Finish}

log = logging.getLogger(__name__)


class FrameLink(Protocol):
    """``protocol.transport.Link``, as far as it is needed here."""

    def send(self, frame: bytes) -> Sent: ...
    def receive(self, limit: int = 64) -> list[bytes]: ...


class EngineClient:
    """The channel of one frontend incarnation to one core incarnation."""

    def __init__(self, link: FrameLink, routing_id: bytes, epoch: int) -> None:
        self._link, self._epoch = link, epoch
        self._waiting: deque[bytes] = deque()     # frames that the queue did not take yet
        self._sent_seq = 0                        # of the last message put on the channel
        self._received_seq = -1                   # of the last message that came; -1: none yet
        self._last_sent_s = 0.0                   # monotonic
        self._unacknowledged: dict[int, dict] = {}    # seq → Abort, until the core says it has it
        self.ready: EngineReady | None = None     # the newest; None until the worker is up
        self._queue(to_core.encode(Hello(PROTOCOL_VERSION, "frontend", routing_id, epoch)))

    # --- to the core -----------------------------------------------------------------------

    def add(self, request: OpenRequest, child: Child) -> None:
        """Submit a child; what it has already said is the forced prefix of its output."""
        kind, interval = request.core_output
        self._send(Add, key=request.core_key, stream=child.stream, child=child.index, attempt=0,
                   attach_no=request.attach_no, resubmitted=False, arrival_ns=request.arrival_ns,
                   prompt_ids=request.prompt_ids, output_ids=child.token_ids.tobytes(),
                   params=child.params, seed=child.seed, priority=request.priority, client=request.client,
                   request_hash=request.request_hash, output_kind=kind, stream_interval=interval,
                   cache_salt=request.cache_salt)

    def abort(self, request: OpenRequest, child: Child | None) -> None:
        """End one child, or all of them."""
        fields = {"key": request.core_key, "child": None if child is None else child.index,
                  "fe_epoch": self._epoch, "attach_no": request.attach_no}
        self._send(Abort, **fields)
        self._unacknowledged[self._sent_seq] = fields

    def tick(self, now_s: float) -> None:
        """Offer what waits; say Heartbeat when there was nothing to say for a second."""
        self._drain()
        if self.ready is not None and not self._waiting and now_s - self._last_sent_s >= HEARTBEAT_S:
            self._send(Heartbeat, sent_seq=self._sent_seq + 1, received_seq=max(0, self._received_seq))

    @property
    def unsent(self) -> bool:
        return bool(self._waiting)

    def _send(self, kind: type[msgspec.Struct], **fields: object) -> None:
        self._sent_seq += 1
        self._last_sent_s = time.monotonic()
        self._queue(to_core.encode(kind(channel_seq=self._sent_seq, **fields)))

    def _queue(self, frame: bytes) -> None:
        self._waiting.append(frame)
        self._drain()

    def _drain(self) -> None:
        while self._waiting and self._link.send(self._waiting[0]) is Sent.OK:
            self._waiting.popleft()

    # --- from the core ---------------------------------------------------------------------

    def receive(self, session: Session, limit: int = 64) -> int:
        """Hand at most ``limit`` messages to the ledger; how many there were."""
        frames = self._link.receive(limit)
        missing = False
        for frame in frames:
            message = to_frontend.decode(frame)
            if isinstance(message, (Reject, Unsupported)):
                log.warning("a frame from the core was not understood: %s", message)
            elif not isinstance(message, Hello):
                missing |= not self._handle(message, session)
        if missing:
            have = [value for entry in session.streams() for value in entry]
            self._send(Sync, have=i32_bytes(have), received_seq=self._received_seq)
        return len(frames)

    def _handle(self, message: msgspec.Struct, session: Session) -> bool:
        """One message; False if something before it is missing."""
        gap = 0 <= self._received_seq < message.channel_seq - 1
        self._received_seq = max(self._received_seq, message.channel_seq)
        match message:
            case EngineReady():
                self.ready = message
            case Accepted(stream=stream):
                session.accept(stream)
            case Rejected(stream=stream, code=code, field=field, message=text):
                session.reject(stream, code, field, text)
            case Outputs():
                try:
                    return self._outputs(message, session) and not gap
                except ColumnError as error:
                    log.error("Outputs %d from the core: %s", message.channel_seq, error)
                    return False
            case Heartbeat(received_seq=received):
                if not gap:      # else a Sync may be missing that told of lost aborts
                    self._split_aborts(received)
            case Sync(have=have, received_seq=received):
                session.resubmit_unknown(set(i32_column(have)[::2].tolist()))
                for fields in self._split_aborts(received):
                    self._send(Abort, **fields)
                    self._unacknowledged[self._sent_seq] = fields
        return not gap

    def _split_aborts(self, received_seq: int) -> list[dict]:
        """Those up to ``received_seq``, which wait no longer; later ones are under way."""
        settled = [fields for seq, fields in self._unacknowledged.items() if seq <= received_seq]
        self._unacknowledged = {seq: fields for seq, fields in self._unacknowledged.items() if seq > received_seq}
        return settled

    def _outputs(self, message: Outputs, session: Session) -> bool:
        """Events and prompt logprobs first: a stream that ends is forgotten at once."""
        for stream, kind, time_ns in message.events or ():
            session.event(stream, EventKind(kind), time_ns)
        if message.prompt_logprobs is not None:
            for rows in split_prompt_logprobs(message.prompt_logprobs):
                session.prompt_rows(*rows)
        complete = True
        for output in split_outputs(message):
            complete &= session.output(output)
        return complete


def split_outputs(message: Outputs) -> Iterator[StreamOutput]:
    """The columns of ``message``, stream by stream; ColumnError where they contradict each other."""
    streams = i32_column(message.stream).tolist()
    n = len(streams)
    offsets = i32_column(message.offset, n, "offset").tolist()
    counts = i32_column(message.count, n, "count").tolist()
    total = sum(counts)
    token_ids = i32_column(message.token_ids, total, "token_ids").tolist()
    if len(message.finish) != n or any(code not in FINISHES for code in message.finish):
        raise ColumnError(f"finish: {message.finish!r} for {n} streams")
    stop_tokens = i32_column(message.stop_token, n, "stop_token").tolist()
    cached = [-1] * n if message.cached_tokens is None else i32_column(
        message.cached_tokens, n, "cached_tokens").tolist()
    columns = None
    if message.logprobs is not None:
        columns = _logprob_columns(message.logprobs, total)
    start = 0
    for i in range(n):
        end = start + counts[i]
        logprobs = None if columns is None else tuple(column[start:end] for column in columns)
        yield StreamOutput(streams[i], offsets[i], token_ids[start:end], FINISHES[message.finish[i]],
                           stop_tokens[i], cached[i], logprobs)
        start = end


def split_prompt_logprobs(
    message: StreamPromptLogprobs,
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
    """(stream, first position, ids [n, width], values [n, width], ranks [n]) of each part."""
    streams = i32_column(message.stream).tolist()
    starts = i32_column(message.start, len(streams), "start").tolist()
    counts = i32_column(message.count, len(streams), "count").tolist()
    columns = _logprob_columns(message, sum(counts))
    row = 0
    for stream, start, count in zip(streams, starts, counts):
        yield stream, start, *(column[row:row + count] for column in columns)
        row += count


def _logprob_columns(rows: LogprobRows | StreamPromptLogprobs, count: int) -> tuple[np.ndarray, ...]:
    """ids [count, width], values [count, width], ranks [count] (0 where the core gives none)."""
    ids = i32_column(rows.ids, count * rows.width, "logprobs.ids").reshape(count, rows.width)
    values = f32_column(rows.values, count * rows.width, "logprobs.values").reshape(count, rows.width)
    ranks = np.zeros(count, "<i4") if rows.ranks is None else i32_column(rows.ranks, count, "logprobs.ranks")
    return ids, values, ranks
