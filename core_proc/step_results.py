"""What a good step brought: tokens appended, requests ended, blocks published.

Called by ``EngineCore.apply``.  The order within is a rule: tokens and decisions of the
whole step first, then publication, then the blocks of those that ended go back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from core_proc.live_requests import LiveRequests
from core_proc.logprob_store import LogprobStore
from core_proc.request import Request, RequestStatus
from core_proc.step import Step
from core_proc.stop_conditions import check_request, check_rows
from core_proc.suspects import Suspects
from protocol.codec import f32_column, i32_column
from protocol.messages import Finish
from protocol.steps import LogprobRows, PromptLogprobRows, StepResult

PromptPart = tuple[Request, int, LogprobStore, int, int]      # request, first position, store, first and end row


class BadResult(RuntimeError):
    """The worker's answer contradicts the plan: a bug of ours."""


@dataclass(slots=True)
class Outcome:
    """What the step changed, for delivery."""

    rows: np.ndarray                                           # i32: still running, gained a token
    late: list[Request] = field(default_factory=list)          # preempted meanwhile, gained a token
    finished: list[Request] = field(default_factory=list)
    first_tokens: list[Request] = field(default_factory=list)
    prompt_parts: list[PromptPart] = field(default_factory=list)


def settle(live: LiveRequests, suspects: Suspects, step: Step, result: StepResult) -> Outcome:
    """Apply an ``ok`` result.  Raises BadResult, ColumnError."""
    columns = live.rows
    num_out = i32_column(result.num_out, len(step.rows), "num_out")
    tokens = np.zeros(len(step.rows), np.int32)
    tokens[num_out > 0] = i32_column(result.token_ids, int(num_out.sum()), "token_ids")
    errors = dict(i32_column(result.row_errors).reshape(-1, 2).tolist())
    sampled = step.samples.copy()
    sampled[list(errors)] = False
    if not np.array_equal(num_out, sampled.astype(np.int32)):
        raise BadResult(f"step {step.step_id}: tokens for other rows than those that sample")
    here = columns.serial[step.rows] == step.serials
    _count_in(live, suspects, step, here)
    ends = _append(live, suspects, step, here, sampled, tokens, result.logprobs)
    outcome = Outcome(rows=step.rows[here & sampled])
    is_first = columns.num_tokens[outcome.rows] == columns.prompt_len[outcome.rows] + 1
    outcome.first_tokens = [columns.request[row] for row in outcome.rows[is_first]]
    if result.prompt_logprobs is not None:
        outcome.prompt_parts = _prompt_rows(columns.request, step, here, result.prompt_logprobs)
    for at in errors:
        request = columns.request[step.rows[at]] if here[at] else step.departed.get(at)
        if request is not None and request.status is not RequestStatus.FINISHED:
            ends[request] = (Finish.ROW_ERROR, -1)
    gained, late_ends = _late_tokens(step, here, sampled, tokens, result.logprobs)
    ends |= late_ends
    suspects.progressed(gained)
    outcome.late = [request for request in gained if request not in ends]
    outcome.first_tokens += [request for request in gained if request.num_tokens == request.prompt_len + 1]
    _publish(live, step, here, errors)
    for request, (finish, stop_token) in ends.items():
        live.finish(request, finish, stop_token)
        suspects.forget(request)
        outcome.finished.append(request)
    outcome.rows = outcome.rows[columns.serial[outcome.rows] == step.serials[here & sampled]]
    return outcome


def _count_in(live: LiveRequests, suspects: Suspects, step: Step, here: np.ndarray) -> None:
    """The step is no longer under way; its tokens are confirmed."""
    columns, rows = live.rows, step.rows[here]
    columns.steps[rows] -= 1
    columns.in_flight[rows] -= step.samples[here]
    columns.num_applied[rows] += step.num_tokens[here]
    further = columns.num_applied[rows] > columns.highest[rows]
    columns.highest[rows] = np.maximum(columns.highest[rows], columns.num_applied[rows])
    if suspects.any:
        suspects.progressed(columns.request[row] for row in rows[further])


def _append(live: LiveRequests, suspects: Suspects, step: Step, here: np.ndarray, sampled: np.ndarray, tokens: np.ndarray,
            logprobs: LogprobRows | None) -> dict[Request, tuple[Finish, int]]:
    """One token to each running row that sampled; which of them it ended."""
    gained = here & sampled
    columns, rows, new = live.rows, step.rows[gained], tokens[gained]
    columns.tokens[rows, columns.num_tokens[rows]] = new
    columns.num_tokens[rows] += 1
    if logprobs is not None:
        _store_logprobs(logprobs, sampled, {i: columns.request[step.rows[i]] for i in np.flatnonzero(gained)})
    if suspects.any:
        suspects.progressed(columns.request[row] for row in rows)
    finish = check_rows(columns, rows, new)
    return {columns.request[rows[i]]: (Finish(finish[i]), int(new[i]) if finish[i] == Finish.STOP else -1)
            for i in np.flatnonzero(finish)}


def _late_tokens(step: Step, here: np.ndarray, sampled: np.ndarray, tokens: np.ndarray,
                 logprobs: LogprobRows | None) -> tuple[list[Request], dict[Request, tuple[Finish, int]]]:
    """Requests that were preempted meanwhile and gained a token, and which of them it ended; tokens of
    finished ones are dropped."""
    gained: list[Request] = []
    ends = {}
    for at, request in step.departed.items():
        if here[at] or request.status is RequestStatus.FINISHED:
            continue
        request.steps_in_flight -= 1
        request.num_in_flight -= int(step.samples[at])
        if not sampled[at]:
            continue
        request.token_ids = np.append(request.token_ids, tokens[at])
        gained.append(request)
        if logprobs is not None:
            _store_logprobs(logprobs, sampled, {at: request})
        finish = check_request(request)
        if finish is not Finish.NONE:
            ends[request] = (finish, int(tokens[at]) if finish is Finish.STOP else -1)
    return gained, ends


def _store_logprobs(logprobs: LogprobRows, sampled: np.ndarray, requests: dict[int, Request]) -> None:
    """Rows of the result stand in the order of its tokens; ``requests`` by their entry in the plan."""
    count = len(logprobs.ids) // 4 // max(1, logprobs.width)
    ids = i32_column(logprobs.ids, count * logprobs.width, "logprobs.ids").reshape(count, logprobs.width)
    values = f32_column(logprobs.values, count * logprobs.width, "logprobs.values").reshape(count, logprobs.width)
    ranks = np.zeros(count, np.int32) if logprobs.ranks is None else i32_column(logprobs.ranks, count, "logprobs.ranks")
    token_row = np.cumsum(sampled) - 1
    for at, request in requests.items():
        if request.logprobs is not None:
            row = slice(token_row[at], token_row[at] + 1)
            request.logprobs.append(ids[row], values[row], ranks[row])


def _prompt_rows(requests: list[Request | None], step: Step, here: np.ndarray, message: PromptLogprobRows) -> list[PromptPart]:
    """Keep the positions that are new; a recomputed request brings old ones again."""
    batch_idx = i32_column(message.batch_idx)
    starts = i32_column(message.start, len(batch_idx), "start").tolist()
    counts = i32_column(message.count, len(batch_idx), "count").tolist()
    total, width = sum(counts), message.width
    ids = i32_column(message.ids, total * width, "ids").reshape(total, width)
    values = f32_column(message.values, total * width, "values").reshape(total, width)
    ranks = np.zeros(total, np.int32) if message.ranks is None else i32_column(message.ranks, total, "ranks")
    parts, row = [], 0
    for at, start, count in zip(batch_idx.tolist(), starts, counts, strict=True):
        end = row + count
        request = requests[step.rows[at]] if here[at] else step.departed.get(at)
        if request is not None and request.status is not RequestStatus.FINISHED and request.prompt_logprobs is not None:
            store = request.prompt_logprobs
            known = 1 + len(store) - start
            if 0 <= known < count:
                first = len(store)
                store.append(ids[row + known:end], values[row + known:end], ranks[row + known:end])
                parts.append((request, 1 + first, store, first, len(store)))
        row = end
    return parts


def _publish(live: LiveRequests, step: Step, here: np.ndarray, errors: dict[int, int]) -> None:
    columns = live.rows
    keep = here.copy()
    keep[list(errors)] = False
    rows = step.rows[keep]
    ready = np.minimum(columns.num_applied[rows], columns.num_tokens[rows]) // columns.block_size
    for row in rows[ready > columns.published[rows]]:
        live.kv.publish(columns.request[row])
