"""The client SDK: ``Client`` and ``AsyncClient`` talk to a running engine over ZeroMQ.

Both move frames for a ``ClientSession``, which knows everything else; they share its
results, errors and prompts.  ``AsyncClient`` is asyncio all the way: the socket's file
descriptor in the event loop, no thread.  A client that leaves has its requests aborted:
on ``close``, on leaving an iterator, on an exception, and by the frontend when the
process is gone.  Use a ``Client`` from one thread at a time (they are cheap: one each).
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import zmq

from frontend.client_connection import CONNECT_TIMEOUT_S, SILENCE_S, ClientConnection
from frontend.client_session import Batch, PendingRequest
from frontend.errors import EngineNotRunning
from frontend.outputs import OutputDelta, RequestOutput
from frontend.prompts import (
    Job, Messages, Prompt, chat_job, conversations, labels, make_jobs, one_job, prompt_list, raw_job,
    stream_options, turn_job, with_params,
)
from protocol.run_dir import RunDir
from protocol.sampling_params import SamplingParams

Params = SamplingParams | Sequence[SamplingParams] | None
WHOLE_CONTEXT = SamplingParams(max_tokens=None)      # chat without parameters: until the model ends


class TokenStream(Iterator[OutputDelta]):
    """The deltas of one request as they come; leaving it aborts the request."""

    def __init__(self, client: "Client", request: PendingRequest) -> None:
        self._client, self._request = client, request

    @property
    def output(self) -> RequestOutput:
        """All so far."""
        return self._request.output

    @property
    def request_id(self) -> str:
        return self._request.output.request_id

    def __next__(self) -> OutputDelta:
        request = self._request
        self._client._wait(lambda: request.deltas or request.ended)
        if request.deltas:
            return request.deltas.popleft()
        if request.error is not None:
            raise request.error
        raise StopIteration

    def result(self) -> RequestOutput:
        """Wait for the end."""
        for _delta in self:
            pass
        return self.output

    def close(self) -> None:
        """Abort the request if it is not over."""
        self._client._abort(self._request)

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client(ClientConnection):
    """Talks to the engine at ``run_dir`` (default: FOLOVLLM_RUN_DIR, else the user's default one).

    ``seed`` makes requests without a seed of their own repeatable: the k-th request of a
    client with this seed always has the same one.
    """

    def __init__(self, run_dir: str | RunDir | None = None, *, seed: int | None = None,
                 timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        super().__init__(run_dir, seed)
        try:
            if not self._wait(lambda: self.session.welcome or self.session.fatal, timeout_s):
                raise self._not_welcomed(timeout_s)
            if self.session.fatal is not None:
                raise EngineNotRunning(str(self.session.fatal))
        except BaseException:
            self._close()
            raise

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0,
               stream_interval: int = 1, request_id: str | None = None) -> TokenStream:
        """Continue ``prompt``; deltas of at least ``stream_interval`` tokens as they come, or what ``params.output_kind`` says."""
        job = one_job(raw_job, prompt, params, SamplingParams(), priority)
        return self._stream(job, stream_options(stream_interval, request_id, job.output_kind))

    def chat(self, messages: Messages | str, params: Params = None, *, stream: bool = True, priority: int = 0,
             stream_interval: int = 1, request_id: str | None = None,
             on_finish: Callable[[RequestOutput], None] | None = None) -> TokenStream | list[RequestOutput]:
        """Answer a conversation: deltas, or with ``stream=False`` the whole (several at once too).

        Without params the answer may take all of the context.
        """
        if stream:
            job = one_job(chat_job, messages, params, WHOLE_CONTEXT, priority)
            return self._stream(job, stream_options(stream_interval, request_id, job.output_kind))
        jobs = make_jobs(conversations(messages), chat_job)
        return self._run(with_params(jobs, params, WHOLE_CONTEXT, priority), None, on_finish)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None, *,
                 priority: int | Sequence[int] = 0,
                 on_finish: Callable[[RequestOutput], None] | None = None) -> list[RequestOutput]:
        """Continue all prompts, as they stand; results in their order.

        ``on_finish`` is called with each result as it comes.
        """
        jobs = make_jobs(prompt_list(prompts), raw_job)
        return self._run(with_params(jobs, params, SamplingParams(), priority), None, on_finish)

    def generate_batch(self, prompts: Prompt | Sequence[Prompt], params: Params = None, *,
                       request_ids: Sequence[str] | None = None, priority: int | Sequence[int] = 0,
                       on_finish: Callable[[RequestOutput], None] | None = None) -> dict[str, RequestOutput]:
        """Answer all prompts: a string is a user turn (where the model has a chat template),
        token ids go in raw.  By request id, in the order of the prompts."""
        jobs = make_jobs(prompt_list(prompts), lambda prompt: turn_job(prompt, self._greeting("has_chat_template")))
        jobs = with_params(jobs, params, SamplingParams(), priority)
        outputs = self._run(jobs, labels(request_ids, len(jobs)), on_finish)
        return {output.request_id: output for output in outputs}

    def abort(self, request: str | TokenStream) -> None:
        """End a request by its id or its stream; what has come stays."""
        found = request._request if isinstance(request, TokenStream) else self.session.find(request)
        if found is not None:
            self._abort(found)

    def close(self) -> None:
        """Abort what is open and leave."""
        self._close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, job: Job, options: dict[str, Any]) -> TokenStream:
        self._check_usable()
        request = self.session.submit(job, streams=True, **options)
        self._push()
        return TokenStream(self, request)

    def _run(self, jobs: list[Job], request_ids: list[str] | None,
             on_finish: Callable[[RequestOutput], None] | None = None) -> list[RequestOutput]:
        self._check_usable()
        batch = Batch(self.session, jobs, request_ids, on_finish)
        try:
            while not batch.done:
                self._wait(lambda: batch.has_news)
                batch.settle()
        finally:
            batch.abort()
            self._push()
        return batch.outputs()

    def _abort(self, request: PendingRequest) -> None:
        if request.ended or self._closed or os.getpid() != self._pid:
            return
        self.session.abort(request)
        self._push()

    def _wait(self, ready: Callable[[], Any], timeout_s: float | None = None) -> bool:
        """Move frames until ``ready()``; False if the time is up before."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not ready():
            self._check_usable()
            self._push()
            left_s = SILENCE_S if deadline_s is None else min(SILENCE_S, deadline_s - time.monotonic())
            if left_s <= 0:
                return False
            events = zmq.POLLIN | (zmq.POLLOUT if self.session.outbox else 0)
            self._link.socket.poll(math.ceil(1000 * left_s), events)
            self._pull()
            self._look()
        return True


class AsyncTokenStream(AsyncIterator[OutputDelta]):
    """The deltas of one request as they come; leaving it (``aclose``, or dropping it) aborts it."""

    def __init__(self, client: "AsyncClient", job: Job, options: dict[str, Any]) -> None:
        self._client, self._job, self._options = client, job, options
        self._news = asyncio.Event()
        self._request: PendingRequest | None = None      # submitted by the first step

    @property
    def output(self) -> RequestOutput | None:
        """All so far; None before the first step."""
        return None if self._request is None else self._request.output

    async def __anext__(self) -> OutputDelta:
        request = self._request
        if request is None:
            news = self._news      # the event alone: a request must not keep its stream from being dropped
            request = self._request = await self._client._submit(
                self._job, on_news=lambda _: news.set(), **self._options)
        await self._client._wait(self._news, lambda: request.deltas or request.ended)
        if request.deltas:
            return request.deltas.popleft()
        if request.error is not None:
            raise request.error
        raise StopAsyncIteration

    async def result(self) -> RequestOutput:
        """Wait for the end."""
        async for _delta in self:
            pass
        return self.output

    async def aclose(self) -> None:
        """Abort the request if it is not over."""
        self._leave()

    async def __aenter__(self) -> "AsyncTokenStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._request is not None:
            self._client._abort(self._request)


class AsyncClient(ClientConnection):
    """``Client`` for asyncio: the same methods, awaited.  Connects on first use, or by ``connect``."""

    def __init__(self, run_dir: str | RunDir | None = None, *, seed: int | None = None,
                 timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        super().__init__(run_dir, seed)
        self._timeout_s = timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived = asyncio.Event()      # some frame came

    async def connect(self) -> "AsyncClient":
        """Wait until the engine is ready."""
        self._check_usable()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._link.socket.fileno(), self._on_readable)
            self._flush()
        greeted = self._wait(self._arrived, lambda: self.session.welcome or self.session.fatal)
        try:
            await asyncio.wait_for(greeted, self._timeout_s)
        except TimeoutError:
            raise self._not_welcomed(self._timeout_s) from None
        if self.session.welcome is None:
            raise EngineNotRunning(str(self.session.fatal))
        return self

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0,
               stream_interval: int = 1, request_id: str | None = None) -> AsyncTokenStream:
        """Continue ``prompt``; deltas of at least ``stream_interval`` tokens as they come, or what ``params.output_kind`` says."""
        job = one_job(raw_job, prompt, params, SamplingParams(), priority)
        return AsyncTokenStream(self, job, stream_options(stream_interval, request_id, job.output_kind))

    def chat(self, messages: Messages | str, params: SamplingParams | None = None, *, priority: int = 0,
             stream_interval: int = 1, request_id: str | None = None) -> AsyncTokenStream:
        """Answer a conversation by deltas; ``await client.chat(…).result()`` gives the whole.

        Without params the answer may take all of the context.
        """
        job = one_job(chat_job, messages, params, WHOLE_CONTEXT, priority)
        return AsyncTokenStream(self, job, stream_options(stream_interval, request_id, job.output_kind))

    async def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None, *,
                       priority: int | Sequence[int] = 0,
                       on_finish: Callable[[RequestOutput], None] | None = None) -> list[RequestOutput]:
        """Continue all prompts, as they stand; results in their order."""
        jobs = with_params(make_jobs(prompt_list(prompts), raw_job), params, SamplingParams(), priority)
        return await self._run(jobs, None, on_finish)

    async def generate_batch(self, prompts: Prompt | Sequence[Prompt], params: Params = None, *,
                             request_ids: Sequence[str] | None = None, priority: int | Sequence[int] = 0,
                             on_finish: Callable[[RequestOutput], None] | None = None) -> dict[str, RequestOutput]:
        """Answer all prompts: a string is a user turn (where the model has a chat template),
        token ids go in raw.  By request id, in the order of the prompts."""
        await self.connect()
        jobs = make_jobs(prompt_list(prompts), lambda prompt: turn_job(prompt, self._greeting("has_chat_template")))
        jobs = with_params(jobs, params, SamplingParams(), priority)
        outputs = await self._run(jobs, labels(request_ids, len(jobs)), on_finish)
        return {output.request_id: output for output in outputs}

    async def abort(self, request: str | AsyncTokenStream) -> None:
        """End a request by its id or its stream; what has come stays."""
        found = request._request if isinstance(request, AsyncTokenStream) else self.session.find(request)
        if found is not None:
            self._abort(found)

    async def close(self) -> None:
        """Abort what is open and leave."""
        self._close()

    async def __aenter__(self) -> "AsyncClient":
        return await self.connect()

    async def __aexit__(self, *_: object) -> None:
        self._close()

    async def _submit(self, job: Job, **options: Any) -> PendingRequest:
        await self.connect()
        request = self.session.submit(job, streams=True, **options)
        self._flush()
        return request

    async def _run(self, jobs: list[Job], request_ids: list[str] | None,
                   on_finish: Callable[[RequestOutput], None] | None) -> list[RequestOutput]:
        await self.connect()
        news = asyncio.Event()
        batch = Batch(self.session, jobs, request_ids, on_finish, on_news=news.set)
        try:
            while not batch.done:
                self._flush()
                await self._wait(news, lambda: batch.has_news)
                batch.settle()
        finally:
            batch.abort()
            if not self._closed:
                self._flush()
        return batch.outputs()

    async def _wait(self, event: asyncio.Event, ready: Callable[[], Any]) -> None:
        """Until ``ready()``; ``event`` tells when to look."""
        while not ready():
            self._check_usable()
            event.clear()
            try:
                await asyncio.wait_for(event.wait(), SILENCE_S)
            except TimeoutError:
                self._look()

    def _abort(self, request: PendingRequest) -> None:
        if not request.ended and not self._closed and os.getpid() == self._pid:
            self.session.abort(request)
            self._push()
            if not self._loop.is_closed():
                self._loop.call_soon(self._on_readable)

    def _flush(self) -> None:
        """Send; a send may swallow the edge that tells of frames to read, so look for them too."""
        self._push()
        self._loop.call_soon(self._on_readable)

    def _on_readable(self) -> None:
        """The descriptor tells of edges, not levels: read until nothing is left."""
        if self._closed:
            return
        if self._pull():
            self._loop.call_soon(self._on_readable)
        self._push()
        self._arrived.set()

    def _close(self) -> None:
        if not self._closed and self._loop is not None and os.getpid() == self._pid and not self._loop.is_closed():
            self._loop.remove_reader(self._link.socket.fileno())
        super()._close()
