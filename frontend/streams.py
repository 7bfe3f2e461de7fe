"""One open request of a client and its n children: what has come, and what has been sent.

Owned by the ledger (``session``), which alone changes them.  A child's text is a pure
function of its ids, so the ids are kept whole and of the text only what is not yet sent.
Everything that leaves is cut from here by offset: a delta that could not be sent is simply
built again, longer.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Protocol

from frontend.logprob_buffer import LogprobBuffer, token_texts
from protocol.messages import Delta, Finish, OutputKind, StreamMetrics, Usage
from protocol.sampling_params import TokenParams, WireParams

MAX_DELTA_TOKENS = 1024      # tokens or logprob rows in one delta: keeps frames far under their limit
STOP_CHECK_TOKENS = 4        # a silent (FINAL) stream with stop strings is looked at this often
FINISH_REASONS = {Finish.STOP: "stop", Finish.LENGTH: "length", Finish.ABORT: "abort"}


class Detokenizer(Protocol):
    """The text of one child, with its stop strings (``frontend.detokenizer``)."""

    stop_reason: str | None      # the stop string found, which ended the text
    num_tokens: int              # tokens consumed, the one that completed the stop string included

    def push(self, token_ids: list[int]) -> str: ...
    def finish(self) -> str: ...


class Child:
    """One continuation: one core request, one detokenizer."""

    __slots__ = ("index", "stream", "seed", "params", "detokenizer", "token_ids", "sent_tokens",
                 "text", "sent_chars", "logprobs", "finish", "stop_reason", "end_sent")

    def __init__(self, index: int, stream: int, seed: int, params: TokenParams,
                 detokenizer: Detokenizer | None) -> None:
        self.index, self.stream, self.seed, self.params = index, stream, seed, params
        self.detokenizer = detokenizer       # None: the client wants no text
        self.token_ids = array("i")          # all output tokens so far
        self.sent_tokens = 0
        self.text = ""                       # not yet sent
        self.sent_chars = 0
        self.logprobs = None if params.logprobs is None else LogprobBuffer(1 + params.logprobs)
        self.finish = Finish.NONE
        self.stop_reason: int | str | None = None
        self.end_sent = False

    def push(self, token_ids: list[int], stop_token: int = -1, keep_stop_token: bool = False) -> int:
        """New tokens; the number that count (fewer where a stop string ends the stream here).

        ``stop_token`` ended the stream in the core: an id of the output, but not of its text.
        """
        before = len(self.token_ids)
        self.token_ids.extend(token_ids)
        if self.detokenizer is None:
            return len(token_ids)
        spoken = token_ids
        if stop_token >= 0 and not keep_stop_token and token_ids and token_ids[-1] == stop_token:
            spoken = token_ids[:-1]
        self.text += self.detokenizer.push(spoken)
        if self.detokenizer.stop_reason is None:
            return len(token_ids)
        del self.token_ids[self.detokenizer.num_tokens:]
        self.end(Finish.STOP, self.detokenizer.stop_reason)
        return len(self.token_ids) - before

    def end(self, finish: Finish, stop_reason: int | str | None = None) -> None:
        """No more tokens; flushes the text that was held back."""
        self.finish, self.stop_reason = finish, stop_reason
        if self.detokenizer is not None and self.detokenizer.stop_reason is None:
            self.text += self.detokenizer.finish()
            if self.detokenizer.stop_reason is not None:
                self.finish, self.stop_reason = Finish.STOP, self.detokenizer.stop_reason

    @property
    def has_news(self) -> bool:
        return bool(self.sent_tokens < len(self.token_ids) or self.text) or (
            self.finish is not Finish.NONE and not self.end_sent)


class OpenRequest:
    """A client's request: its prompt once, its children, its end."""

    __slots__ = ("client", "key", "core_key", "attach_no", "prompt_ids", "wire", "params", "priority",
                 "output_kind", "stream_interval", "cache_salt", "request_hash", "arrival_ns",
                 "children", "accepted", "accept_sent", "prompt_logprobs", "prompt_rows",
                 "cached_tokens", "admitted_ns", "first_token_ns", "num_preemptions", "error", "closed")

    def __init__(self, *, client: bytes, key: bytes, core_key: bytes, attach_no: int, prompt_ids: bytes,
                 wire: WireParams, params: TokenParams, priority: int, output_kind: OutputKind,
                 stream_interval: int, cache_salt: bytes | None, request_hash: bytes, arrival_ns: int) -> None:
        self.client, self.key, self.core_key, self.attach_no = client, key, core_key, attach_no
        self.prompt_ids, self.wire, self.params = prompt_ids, wire, params   # prompt_ids: i32[n]
        self.priority, self.output_kind, self.stream_interval = priority, output_kind, stream_interval
        self.cache_salt, self.request_hash, self.arrival_ns = cache_salt, request_hash, arrival_ns
        self.children: list[Child] = []
        self.accepted = self.accept_sent = False
        self.prompt_logprobs = None if params.prompt_logprobs is None else LogprobBuffer(1 + params.prompt_logprobs)
        self.prompt_rows = 0                 # rows received, delivered ones included
        self.cached_tokens = 0
        self.admitted_ns: int | None = None
        self.first_token_ns: int | None = None
        self.num_preemptions = 0
        self.error: tuple[int | None, str, str, str] | None = None   # index, code, field, message
        self.closed = False                  # its one terminal event has left

    @property
    def streams_text(self) -> bool:
        return self.output_kind is OutputKind.DELTA

    @property
    def lacks_prompt_rows(self) -> bool:
        """The core gives prompt logprobs no later than the first token."""
        return self.prompt_logprobs is not None and self.prompt_rows < len(self.prompt_ids) // 4 - 1

    @property
    def core_output(self) -> tuple[OutputKind, int]:
        """What to ask of the core: stop strings are found here, so it must show the tokens."""
        if self.output_kind is OutputKind.FINAL and self.wire.stop:
            return OutputKind.DELTA, STOP_CHECK_TOKENS
        return self.output_kind, self.stream_interval

    @property
    def ended(self) -> bool:
        """Nothing more will come from the core."""
        return self.error is not None or all(c.finish is not Finish.NONE for c in self.children)

    def usage(self) -> Usage:
        """The prompt is counted once, whatever n."""
        return Usage(len(self.prompt_ids) // 4, sum(len(c.token_ids) for c in self.children), self.cached_tokens)

    def metrics(self, now_ns: int) -> StreamMetrics:
        def since_arrival(moment_ns: int | None) -> float | None:
            return None if moment_ns is None else max(0, moment_ns - self.arrival_ns) / 1e9

        return StreamMetrics(
            arrival_time_s=self.arrival_ns / 1e9, queue_time_s=since_arrival(self.admitted_ns),
            time_to_first_token_s=since_arrival(self.first_token_ns), finished_time_s=now_ns / 1e9,
            num_preemptions=self.num_preemptions)

    def next_delta(self, child: Child, now_ns: int, text_of: Callable[[int], str]) -> Delta | None:
        """The next piece of ``child`` that is due, not yet counted as sent; None if there is none."""
        prompt = self.prompt_logprobs if child.index == 0 else None
        over = self.error is None and child.finish is not Finish.NONE
        if not (child.has_news or prompt) or not (self.streams_text or over or self.error is not None):
            return None
        num_tokens = min(len(child.token_ids) - child.sent_tokens, MAX_DELTA_TOKENS)
        num_prompt_rows = min(len(prompt), MAX_DELTA_TOKENS) if prompt else 0
        last = (over and child.sent_tokens + num_tokens == len(child.token_ids)
                and num_prompt_rows == (len(prompt) if prompt else 0))
        closing = last and all(c is child or c.end_sent for c in self.children)
        rows = child.logprobs.peek(num_tokens) if child.logprobs is not None and num_tokens else None
        prompt_rows = prompt.peek(num_prompt_rows) if num_prompt_rows else None
        return Delta(
            key=self.key, index=child.index, token_offset=child.sent_tokens,
            token_ids=child.token_ids[child.sent_tokens:child.sent_tokens + num_tokens].tobytes(),
            char_offset=child.sent_chars, text=child.text, logprobs=rows, prompt_logprobs=prompt_rows,
            finish_reason=FINISH_REASONS[child.finish] if last else None,
            stop_reason=child.stop_reason if last else None,
            usage=self.usage() if closing else None, metrics=self.metrics(now_ns) if closing else None,
            logprob_texts=None if rows is None else token_texts(rows, text_of),
            prompt_logprob_texts=None if prompt_rows is None else token_texts(prompt_rows, text_of))

    def mark_sent(self, child: Child, delta: Delta) -> None:
        """``delta`` is in the client's queue: it will not be built again."""
        num_tokens = len(delta.token_ids) // 4
        child.sent_tokens += num_tokens
        child.sent_chars += len(delta.text)
        child.text = ""
        child.end_sent = delta.finish_reason is not None
        self.closed = self.closed or delta.usage is not None
        if child.logprobs is not None:
            child.logprobs.drop(num_tokens)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs.drop(len(delta.prompt_logprobs.ranks) // 4)
