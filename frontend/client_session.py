"""The SDK's side of the conversation: its own ledger of its open requests.

Sans-I/O, shared by ``Client`` and ``AsyncClient``: they move frames and wait, everything
else is here.  Must stay true: every request ends exactly once (its last delta, an error,
an abort of ours, or the engine's death), and frames of requests that have ended are ignored.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable

import msgspec

from frontend.errors import EngineDead, RequestFailed
from frontend.outputs import (
    CompletionOutput, OutputDelta, RequestOutput, add_logprobs, to_metrics, unpack_logprobs,
)
from frontend.prompts import Job, at_index
from protocol.codec import PROTOCOL_VERSION, Reject, Unsupported, i32_column
from protocol.messages import (
    AbortStream, AcceptedStream, Connect, Delta, Error, Finish, Generate, OutputKind, Welcome, from_sdk,
    to_sdk,
)
from protocol.sampling_params import BadRequest, RequestOutputKind, SamplingParams

MAX_OPEN_CHILDREN = 2048     # of one batch at a time; the rest waits here, so no queue overflows
DEAD_CODES = {finish.name.lower() for finish in (Finish.ENGINE_LOST, Finish.SHUTDOWN)}


class PendingRequest:
    """One request from its Generate to its end; ``output`` grows as deltas come."""

    def __init__(self, key: bytes, request_id: str, job: Job, streams: bool,
                 on_news: Callable[["PendingRequest"], None] | None) -> None:
        self.key, self.job, self.streams, self.on_news = key, job, streams, on_news
        self.output_kind = job.output_kind or (RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY)
        self.output = RequestOutput(request_id, job.prompt)
        self.output.outputs = [CompletionOutput(i) for i in range(job.params.n)]
        self.deltas: deque[OutputDelta] = deque()      # of a stream: not yet yielded
        self.error: Exception | None = None
        self.ended = False
        self._delta_times_s: list[float] = []          # monotonic
        if job.params.logprobs is not None:
            for output in self.output.outputs:
                output.logprobs, output.cumulative_logprob = [], 0.0

    def accept(self, message: AcceptedStream) -> None:
        self.output.prompt_token_ids = i32_column(message.prompt_token_ids).tolist()
        if self.job.params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]

    def gain(self, delta: Delta) -> None:
        """Append what a delta brings, exactly at its place."""
        output = self.output.outputs[delta.index]
        if delta.token_offset != len(output.token_ids) or delta.char_offset != len(output.text):
            self.end(RequestFailed("internal", f"a delta of request {self.output.request_id} is missing: token"
                                   f" {delta.token_offset} follows {len(output.token_ids)}"))
            return
        token_ids = i32_column(delta.token_ids).tolist()
        output.token_ids += token_ids
        output.text += delta.text
        logprobs = None
        if delta.logprobs is not None:
            logprobs = unpack_logprobs(delta.logprobs, delta.logprob_texts)
            add_logprobs(output, logprobs)
        if delta.prompt_logprobs is not None:
            self.output.prompt_logprobs += unpack_logprobs(delta.prompt_logprobs, delta.prompt_logprob_texts)
        output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
        if self.streams:
            self._delta_times_s.append(time.monotonic())
            self._show(output, OutputDelta(delta.index, delta.text, token_ids, logprobs, delta.finish_reason, delta.stop_reason))
        if delta.usage is not None:
            self.output.num_cached_tokens = delta.usage.cached_tokens
        if delta.metrics is not None:
            longest = max(len(o.token_ids) for o in self.output.outputs)
            self.output.metrics = to_metrics(delta.metrics, longest, self._delta_times_s)
        if delta.usage is not None:
            self.end()

    def _show(self, output: CompletionOutput, gained: OutputDelta) -> None:
        """To the reader of a stream, as it wants it; ``output`` has taken ``gained`` in."""
        if self.output_kind is RequestOutputKind.DELTA:
            self.deltas.append(gained)
        elif self.output_kind is RequestOutputKind.CUMULATIVE or gained.finish_reason is not None:
            logprobs = None if output.logprobs is None else list(output.logprobs)
            self.deltas.append(OutputDelta(output.index, output.text, list(output.token_ids), logprobs,
                                           output.finish_reason, output.stop_reason))

    def end(self, error: Exception | None = None) -> None:
        if not self.ended:
            self.ended, self.error = True, error
            self.output.finished = error is None

    def abort(self) -> None:
        """Our own wish: what has come stays."""
        for output in self.output.outputs:
            output.finish_reason = output.finish_reason or "abort"
        self.end()


class ClientSession:
    """All open requests of one client."""

    def __init__(self, seed: int | None = None) -> None:
        self._seed = SamplingParams(seed=seed).seed      # checked; makes the seeds of requests without one repeatable
        self._open: dict[bytes, PendingRequest] = {}
        self._count = 0                      # requests so far
        self.outbox: deque[bytes] = deque([from_sdk.encode(Connect(PROTOCOL_VERSION))])
        self.welcome: Welcome | None = None
        self.fatal: Exception | None = None  # nothing more can be asked of this engine

    @property
    def num_open(self) -> int:
        return len(self._open)

    def submit(self, job: Job, *, streams: bool, stream_interval: int = 1, request_id: str | None = None,
               on_news: Callable[[PendingRequest], None] | None = None) -> PendingRequest:
        """Put the request's frame into the outbox."""
        self._count += 1
        key = os.urandom(16)
        seed = job.seed
        if seed is None and self._seed is not None:
            material = f"{self._seed} {self._count}".encode()
            seed = int.from_bytes(hashlib.blake2b(material, digest_size=8).digest(), "little")
        request = PendingRequest(key, request_id or str(self._count - 1), job, streams, on_news)
        self.outbox.append(from_sdk.encode(Generate(
            key=key, text=job.text, token_ids=job.token_ids, messages=job.messages, params=job.params,
            priority=job.priority, output_kind=_on_the_wire(request),
            stream_interval=stream_interval, seed=seed, cache_salt=job.cache_salt)))
        self._open[key] = request
        return request

    def find(self, request_id: str) -> PendingRequest | None:
        return next((r for r in self._open.values() if r.output.request_id == request_id), None)

    def abort(self, request: PendingRequest) -> None:
        """Tell the engine, and end here at once; nothing if it has ended."""
        if self._open.pop(request.key, None) is None:
            return
        self.outbox.append(from_sdk.encode(AbortStream(request.key, 0)))
        request.abort()
        if request.on_news is not None:
            request.on_news(request)

    def abort_all(self) -> None:
        for request in list(self._open.values()):
            self.abort(request)

    def die(self, error: Exception) -> None:
        """The engine is gone: so is every request."""
        self.fatal = self.fatal or error
        for request in list(self._open.values()):
            self._end(request, error)

    def receive(self, frame: bytes) -> None:
        """One frame of the engine."""
        message = to_sdk.decode(frame)
        match message:
            case Welcome():
                self.welcome = message
            case Error(key=None):
                self.die(_to_exception(message))
            case Reject() | Unsupported():
                self.die(EngineDead(f"a frame of the engine was not understood: {message}"))
            case AcceptedStream() | Delta() | Error():
                self._of_request(message)

    def _of_request(self, message: msgspec.Struct) -> None:
        request = self._open.get(message.key)
        if request is None:
            return
        if isinstance(message, Error):
            self._end(request, _to_exception(message))
            return
        if isinstance(message, AcceptedStream):
            request.accept(message)
            return
        request.gain(message)
        if request.ended:
            del self._open[request.key]
        if request.on_news is not None:
            request.on_news(request)

    def _end(self, request: PendingRequest, error: Exception) -> None:
        del self._open[request.key]
        request.end(error)
        if request.on_news is not None:
            request.on_news(request)


class Batch:
    """Many requests, a bounded number open at a time; results in input order."""

    def __init__(self, session: ClientSession, jobs: list[Job], request_ids: list[str] | None = None,
                 on_finish: Callable[[RequestOutput], None] | None = None,
                 on_news: Callable[[], None] | None = None) -> None:
        self._session, self._jobs, self._request_ids = session, jobs, request_ids
        self._on_finish, self._on_news = on_finish, on_news
        self._requests: list[PendingRequest] = []      # submitted so far, in input order
        self._open_children = 0
        self._ended: deque[PendingRequest] = deque()   # not yet settled
        self._num_settled = 0
        self.submit()

    @property
    def done(self) -> bool:
        return self._num_settled == len(self._jobs)

    @property
    def has_news(self) -> bool:
        return bool(self._ended)

    def submit(self) -> None:
        """Open as many more requests as there is room for."""
        while (position := len(self._requests)) < len(self._jobs):
            job = self._jobs[position]
            if self._open_children and self._open_children + job.params.n > MAX_OPEN_CHILDREN:
                return
            self._open_children += job.params.n
            request_id = None if self._request_ids is None else self._request_ids[position]
            self._requests.append(self._session.submit(
                job, streams=False, request_id=request_id, on_news=self._news))

    def settle(self) -> None:
        """Take in what has ended; the first error is raised, naming its prompt."""
        while self._ended:
            request = self._ended.popleft()
            self._num_settled += 1
            self._open_children -= request.job.params.n
            if isinstance(request.error, BadRequest):
                raise at_index(request.error, self._requests.index(request), len(self._jobs))
            if request.error is not None:
                raise request.error
            if self._on_finish is not None:
                self._on_finish(request.output)
        self.submit()

    def abort(self) -> None:
        """End what is still open: on an error, an interrupt, a cancelled task."""
        for request in self._requests:
            self._session.abort(request)

    def outputs(self) -> list[RequestOutput]:
        return [request.output for request in self._requests]

    def _news(self, request: PendingRequest) -> None:
        if request.ended:
            self._ended.append(request)
            if self._on_news is not None:
                self._on_news()


def _on_the_wire(request: PendingRequest) -> OutputKind:
    """Who is shown nothing before the end needs nothing sent before it."""
    return OutputKind.DELTA if request.streams and request.output_kind is not RequestOutputKind.FINAL_ONLY else OutputKind.FINAL


def _to_exception(error: Error) -> Exception:
    """What an Error of the engine becomes for the user: what names a field is bad input."""
    if error.code in DEAD_CODES:
        return EngineDead(error.message)
    if error.field:
        return BadRequest(error.field, error.message, error.code)
    return RequestFailed(error.code, error.message)
