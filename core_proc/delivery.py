"""Tokens of running requests to their frontends, when they are due.

Owned by ``EngineCore``; one Outputs a channel and step, built from columns.
"""

from __future__ import annotations

import numpy as np

from core_proc.channel import Channel
from core_proc.live_requests import LiveRequests
from core_proc.logprob_store import LogprobStore
from core_proc.request import NEVER, Request, RequestStatus
from protocol.codec import i32_bytes
from protocol.messages import Finish

NO_STOP_TOKEN = i32_bytes([-1])
PromptRows = list[tuple[int, int, LogprobStore, int, int]]    # stream, first position, store, first and end row


def deliver(live: LiveRequests, channels: dict[int, Channel], rows: np.ndarray, waiting: list[Request], finished: list[Request],
            prompt_rows: dict[int, PromptRows], now_ns: int) -> None:
    """Send what ``rows`` and ``waiting`` owe, then the ends of ``finished``; ``prompt_rows`` by channel index."""
    columns = live.rows
    known = columns.num_tokens[rows]
    due = rows[(known >= columns.emit_at[rows]) & (known > columns.sent[rows])]
    owners = columns.channel[due]
    for index, channel in channels.items():
        own = due[owners == index]
        parts = prompt_rows.get(index)
        if own.size or parts:
            _send_rows(live, channel, own, parts, now_ns)
        rest = [r for r in waiting if r.channel is channel and r.num_tokens >= r.emit_at] + [r for r in finished if r.channel is channel]
        if rest:
            channel.outputs(rest, now_ns)


def deliver_again(live: LiveRequests, channel: Channel, request: Request, have: int, now_ns: int) -> None:
    """One stream from output token ``have`` on, and its prompt logprobs; one that speaks at its end waits for that."""
    columns, row, store = live.rows, request.req_idx, request.prompt_logprobs
    parts = [(request.stream, 1, store, 0, len(store))] if store is not None and len(store) else None
    running = request.status is RequestStatus.RUNNING
    known = int(columns.num_tokens[row]) if running else request.num_tokens
    silent = request.finish is Finish.NONE and (columns.emit_at[row] if running else request.emit_at) == NEVER
    sent = min(request.prompt_len + max(0, have), known)
    if running:
        columns.sent[row] = sent
    else:
        request.sent_tokens = sent
    due = not silent and (known > sent or request.finish is not Finish.NONE)
    if due and not running:
        channel.outputs([request], now_ns, parts)
    elif due or parts:
        _send_rows(live, channel, np.array([row] if due else [], np.intp), parts, now_ns)


def _send_rows(live: LiveRequests, channel: Channel, rows: np.ndarray, parts: PromptRows | None, now_ns: int) -> None:
    columns = live.rows
    sent, known, prompt_len = columns.sent[rows], columns.num_tokens[rows], columns.prompt_len[rows]
    count = known - sent
    if np.count_nonzero(count == 1) == len(rows):
        token_ids = columns.tokens_at(rows, sent)
    else:
        position = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - sent, count)
        token_ids = columns.tokens[np.repeat(rows, count), position]
    first, cached = (sent == prompt_len).nonzero()[0].tolist(), None
    if first:
        cached = [-1] * len(rows)
        for i in first:
            cached[i] = columns.request[rows[i]].num_cached_tokens
    with_logprobs = [columns.request[row] for row in rows[columns.logprobs[rows]].tolist()]
    channel.send_columns(
        with_logprobs, now_ns, stream=columns.stream[rows], offset=sent - prompt_len, count=count, token_ids=token_ids,
        finish=bytes(len(rows)), stop_token=NO_STOP_TOKEN * len(rows), cached=cached, prompt_logprobs=parts)
    columns.sent[rows] = known
    columns.emit_at[rows] = known + columns.interval[rows]
