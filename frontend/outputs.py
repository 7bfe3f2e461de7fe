"""What a user gets back: vLLM's RequestOutput and its parts, and the delta of a stream.

Filled by the SDK (``client_session``); plain data.  Times are in seconds.
"""

from __future__ import annotations

import msgspec
import numpy as np

from protocol.messages import StreamMetrics
from protocol.steps import LogprobRows


class Logprob(msgspec.Struct):
    """Of one candidate token at one position."""

    logprob: float
    rank: int | None = None              # 1 is the most likely token
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]            # token id → logprob, the token itself first


class CompletionOutput(msgspec.Struct):
    """One continuation."""

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    cumulative_logprob: float | None = None      # sum over token_ids, in order; None if not asked for
    logprobs: list[Logprobs] | None = None       # one per token id
    finish_reason: str | None = None             # "stop" | "length" | "abort"; None while it goes on
    stop_reason: int | str | None = None         # the stop id or stop string; None for EOS

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct):
    """Where the time went."""

    arrival_time_s: float                        # time.time() at the frontend
    queue_time_s: float | None = None            # until its first admission
    time_to_first_token_s: float | None = None
    finished_time_s: float | None = None         # time.time()
    num_preemptions: int = 0
    mean_inter_token_time_s: float | None = None
    inter_token_times_s: list[float] = msgspec.field(default_factory=list)   # between the deltas of a stream


class RequestOutput(msgspec.Struct):
    """The answer to one prompt."""

    request_id: str
    prompt: str | None                           # None where token ids or messages were given
    prompt_token_ids: list[int] = msgspec.field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None    # one per prompt token; None for the first
    outputs: list[CompletionOutput] = msgspec.field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None        # with the end
    num_cached_tokens: int | None = None         # prompt tokens taken from the prefix cache; with the end


class OutputDelta(msgspec.Struct):
    """What one continuation gained since the last delta of a stream; with another ``output_kind``
    than DELTA all that it has so far."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


def unpack_logprobs(rows: LogprobRows, texts: list[str] | None) -> list[Logprobs]:
    """One dict per row: the token itself with its rank, then the best ones with theirs."""
    count = len(rows.ids) // (4 * rows.width) if rows.width else 0
    ids = np.frombuffer(rows.ids, "<i4").reshape(count, rows.width).tolist()
    values = np.frombuffer(rows.values, "<f4").reshape(count, rows.width).tolist()
    ranks = [None] * count if rows.ranks is None else np.frombuffer(rows.ranks, "<i4").tolist()
    found = []
    for r in range(count):
        row: Logprobs = {}
        for column, (token, value) in enumerate(zip(ids[r], values[r])):
            if token < 0 or token in row:
                continue
            text = texts[r * rows.width + column] if texts else None
            row[token] = Logprob(value, column or (ranks[r] or None), text)
        found.append(row)
    return found


def add_logprobs(output: CompletionOutput, logprobs: list[Logprobs]) -> None:
    """Append rows; the cumulative sum runs in fp64, in token order."""
    start = len(output.logprobs or ())
    output.logprobs = (output.logprobs or []) + logprobs
    total = output.cumulative_logprob or 0.0
    for token, row in zip(output.token_ids[start:], logprobs):
        total += row[token].logprob
    output.cumulative_logprob = total


def to_metrics(wire: StreamMetrics, num_tokens: int, delta_times_s: list[float]) -> RequestMetrics:
    """``num_tokens``: of the longest continuation; ``delta_times_s``: monotonic arrivals here."""
    mean = None
    if num_tokens > 1 and wire.time_to_first_token_s is not None and wire.finished_time_s is not None:
        decode_s = wire.finished_time_s - wire.arrival_time_s - wire.time_to_first_token_s
        mean = max(0.0, decode_s) / (num_tokens - 1)
    return RequestMetrics(
        arrival_time_s=wire.arrival_time_s, queue_time_s=wire.queue_time_s,
        time_to_first_token_s=wire.time_to_first_token_s, finished_time_s=wire.finished_time_s,
        num_preemptions=wire.num_preemptions, mean_inter_token_time_s=mean,
        inter_token_times_s=[b - a for a, b in zip(delta_times_s, delta_times_s[1:])])
