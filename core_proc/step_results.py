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

    rows: np.ndarray                                           # intp: still running, gained tokens
    late: list[Request] = field(default_factory=list)          # preempted meanwhile, gained tokens
    finished: list[Request] = field(default_factory=list)
    first_tokens: list[Request] = field(default_factory=list)
    prompt_parts: list[PromptPart] = field(default_factory=list)


@dataclass(slots=True)
class StepTokens:
    """The tokens of a result, checked against what the step may have sampled."""

    num_out: np.ndarray                     # i32[R]
    first: np.ndarray                       # i64[R] where an entry's tokens begin
    ids: np.ndarray                         # i32[sum(num_out)] entry after entry
    errors: dict[int, int]                  # entry → RowError
    logprobs: tuple[np.ndarray, np.ndarray, np.ndarray] | None    # ids, values, ranks: a row for each of ``ids``

    @classmethod
    def read(cls, step: Step, result: StepResult) -> StepTokens:
        """Raises BadResult, ColumnError."""
        num_out = i32_column(result.num_out, len(step.rows), "num_out")
        errors = dict(i32_column(result.row_errors).reshape(-1, 2).tolist()) if result.row_errors else {}
        wrong = num_out != step.samples
        if step.num_drafts is not None:
            wrong &= (step.num_drafts == 0) | (num_out < 1) | (num_out > step.samples)
        for at in errors:                   # what came before the error counts
            if not 0 <= at < len(wrong):
                raise BadResult(f"step {step.step_id}: an error of entry {at}, which it does not have")
            wrong[at] = not 0 <= num_out[at] < max(1, step.samples[at])
        if np.count_nonzero(wrong):
            raise BadResult(f"step {step.step_id}: other tokens than those that it samples")
        end = num_out.cumsum()
        ids = i32_column(result.token_ids, int(end[-1]), "token_ids")
        return cls(num_out, end - num_out, ids, errors, _logprob_columns(result.logprobs, len(ids)))


def settle(live: LiveRequests, suspects: Suspects, step: Step, result: StepResult) -> Outcome:
    """Apply an ``ok`` result.  Raises BadResult, ColumnError."""
    columns = live.rows
    tokens = StepTokens.read(step, result)
    here = columns.serial[step.rows] == step.serials
    gained = here & (tokens.num_out > 0)
    _count_in(live, suspects, step, here, tokens)
    rows = step.rows[gained]
    is_first = columns.num_tokens[rows] == columns.prompt_len[rows]
    outcome = Outcome(rows, first_tokens=[columns.request[row] for row in rows[is_first].tolist()])
    ends = _append(live, suspects, step, gained, tokens)
    if result.prompt_logprobs is not None:
        outcome.prompt_parts = _prompt_rows(columns.request, step, here, result.prompt_logprobs)
    for at in tokens.errors:
        request = columns.request[step.rows[at]] if here[at] else step.departed.get(at)
        if request is not None and request.status is not RequestStatus.FINISHED:
            ends.setdefault(request, (Finish.ROW_ERROR, -1))      # unless it had ended before
    late, late_ends = _late_tokens(step, here, tokens)
    ends |= late_ends
    suspects.progressed(late)
    outcome.late = [request for request in late if request not in ends]
    outcome.first_tokens += [request for request, count in late.items() if request.num_tokens - count == request.prompt_len]
    _publish(live, step, here, tokens.errors)
    for request, (finish, stop_token) in ends.items():
        live.finish(request, finish, stop_token)
        suspects.forget(request)
        outcome.finished.append(request)
    if ends:
        outcome.rows = rows[columns.serial[rows] == step.serials[gained]]
    return outcome


def _count_in(live: LiveRequests, suspects: Suspects, step: Step, here: np.ndarray, tokens: StepTokens) -> None:
    """The step is no longer under way; its tokens are confirmed, but for drafts that were rejected."""
    columns = live.rows
    every = slice(None) if np.count_nonzero(here) == len(here) else here
    rows, confirmed = step.rows[every], step.num_tokens[every]
    columns.steps[rows] -= 1
    columns.in_flight[rows] -= step.samples[every]
    if step.num_drafts is not None:
        rejected = np.where(step.num_drafts > 0, step.samples - tokens.num_out, 0)[every]
        columns.num_computed[rows] -= rejected
        confirmed = confirmed - rejected
    applied, highest = columns.num_applied[rows] + confirmed, columns.highest[rows]
    columns.num_applied[rows] = applied
    columns.highest[rows] = np.maximum(highest, applied)
    if suspects.any:
        suspects.progressed(columns.request[row] for row in rows[applied > highest])


def _append(live: LiveRequests, suspects: Suspects, step: Step, gained: np.ndarray,
            tokens: StepTokens) -> dict[Request, tuple[Finish, int]]:
    """Their tokens to the running rows, one after another until one ends the request; which it ended."""
    columns, ends = live.rows, {}
    at, before = gained.nonzero()[0], columns.num_tokens
    if tokens.logprobs is not None:
        before = before.copy()
    most = 1 if step.num_steps == 1 and step.num_drafts is None else int(tokens.num_out.max())
    for number in range(most):
        if number:
            at = at[(finish == Finish.NONE) & (tokens.num_out[at] > number)]
        rows, new = step.rows[at], tokens.ids[tokens.first[at] + number]
        columns.append_tokens(rows, new)
        finish = check_rows(columns, rows, new)
        for i in finish.nonzero()[0].tolist():
            ends[columns.request[rows[i]]] = (Finish(finish[i]), int(new[i]) if finish[i] == Finish.STOP else -1)
    if tokens.logprobs is not None:
        for i in gained.nonzero()[0].tolist():
            row = step.rows[i]
            _store_logprobs(columns.request[row], tokens, i, int(columns.num_tokens[row] - before[row]))
    if suspects.any:
        suspects.progressed(columns.request[row] for row in step.rows[gained])
    return ends


def _late_tokens(step: Step, here: np.ndarray, tokens: StepTokens) -> tuple[dict[Request, int], dict[Request, tuple[Finish, int]]]:
    """Requests that were preempted meanwhile, how many tokens each gained, and which of them these
    ended; tokens of finished ones are dropped."""
    gained: dict[Request, int] = {}
    ends = {}
    for at, request in step.departed.items():
        if here[at] or request.status is RequestStatus.FINISHED:
            continue
        request.steps_in_flight -= 1
        request.num_in_flight -= int(step.samples[at])
        finish, count = Finish.NONE, 0
        while count < tokens.num_out[at] and finish is Finish.NONE:
            request.token_ids = np.append(request.token_ids, tokens.ids[tokens.first[at] + count])
            finish, count = check_request(request), count + 1
        if count:
            gained[request] = count
        if count and tokens.logprobs is not None:
            _store_logprobs(request, tokens, at, count)
        if finish is not Finish.NONE:
            ends[request] = (finish, int(request.token_ids[-1]) if finish is Finish.STOP else -1)
    return gained, ends


def _store_logprobs(request: Request, tokens: StepTokens, at: int, count: int) -> None:
    """Of the first ``count`` tokens of entry ``at``."""
    if request.logprobs is not None:
        part = slice(tokens.first[at], tokens.first[at] + count)
        request.logprobs.append(*(column[part] for column in tokens.logprobs))


def _logprob_columns(rows: LogprobRows | None, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    if rows is None:
        return None
    size = count * rows.width
    ids = i32_column(rows.ids, size, "logprobs.ids").reshape(count, rows.width)
    values = f32_column(rows.values, size, "logprobs.values").reshape(count, rows.width)
    ranks = np.zeros(count, np.int32) if rows.ranks is None else i32_column(rows.ranks, count, "logprobs.ranks")
    return ids, values, ranks


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
    columns, keep = live.rows, here
    if errors:
        keep = here.copy()
        keep[list(errors)] = False
    rows = step.rows[keep]
    ready = np.minimum(columns.num_applied[rows], columns.num_tokens[rows]) // columns.block_size
    for row in rows[ready > columns.published[rows]].tolist():
        live.kv.publish(columns.request[row])
