"""A core without processes: requests in by hand, results made up, outputs collected."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from core_proc.engine_core import EngineCore
from core_proc.request import Request
from protocol.codec import i32_bytes, i32_column
from protocol.config import SchedulerConfig
from protocol.messages import Abort, Add, Finish, OutputKind, Outputs
from protocol.sampling_params import TokenParams
from protocol.steps import PromptLogprobRows, StepPlan, StepResult, StepStatus, WorkerReady

FRONTEND = b"f0.e1"
VOCAB = 1000


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Harness:
    """One core, one frontend, a worker that answers with tokens counted up from 100."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4, max_model_len: int = 128, period: int = 800, **config: Any) -> None:
        settings = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, "watermark": 0.0} | config)
        msgspec.structs.force_setattr(settings, "block_size", block_size)     # small blocks make small tests
        ready = WorkerReady(1, 1, "f", num_blocks, settings.max_num_seqs, VOCAB, b"", [], max_model_len)
        self.core = EngineCore(settings, ready)
        self.now_ns = 1
        self.seq = 0
        self.period = period                     # the token at position p is 100 + p % period
        self.plans: list[StepPlan] = []          # sent, not answered
        self.messages: list[Any] = []
        self.core.connect(FRONTEND, self.now_ns)

    # --- as the frontend ---

    def add(self, number: int, prompt: list[int] | int, max_tokens: int = 4, *, child: int = 0, priority: int = 0,
            output_ids: list[int] = (), stop_ids: list[int] = (), final: bool = False, cache_salt: bytes | None = None,
            **params: Any) -> Request | None:
        """``prompt``: ids, or a number of tokens that nobody else's prompt begins with."""
        ids = [(number * 131 + i) % VOCAB for i in range(prompt)] if isinstance(prompt, int) else prompt
        self.tell(Add, key=key_of(number), stream=number * 16 + child, child=child, attempt=0, attach_no=0, resubmitted=False,
                  arrival_ns=self.now_ns, prompt_ids=i32_bytes(ids), output_ids=i32_bytes(list(output_ids)),
                  params=TokenParams(max_tokens=max_tokens, stop_token_ids=i32_bytes(list(stop_ids)), **params), seed=number,
                  priority=priority, client=b"c", request_hash=b"", cache_salt=cache_salt,
                  output_kind=OutputKind.FINAL if final else OutputKind.DELTA)
        return self.core.live.get(key_of(number), child)

    def abort(self, number: int, child: int | None = None) -> None:
        self.tell(Abort, key=key_of(number), child=child, fe_epoch=1, attach_no=0)

    def tell(self, kind: type, **fields: Any) -> None:
        self.seq += 1
        self.now_ns += 1
        self.core.handle(FRONTEND, kind(channel_seq=self.seq, **fields), self.now_ns)

    def outputs(self, number: int, child: int = 0) -> tuple[list[int], Finish]:
        """(tokens, end) of one stream so far."""
        self.messages += [message for _, message in self.core.take_outputs()]
        tokens: list[int] = []
        finish = Finish.NONE
        for message in self.messages:
            if isinstance(message, Outputs):
                at = 0
                counts = i32_column(message.count).tolist()
                for i, stream in enumerate(i32_column(message.stream).tolist()):
                    if stream == number * 16 + child:
                        offset = int(i32_column(message.offset)[i])
                        assert offset <= len(tokens) or not tokens      # a forced prefix is not told again
                        del tokens[offset:]
                        tokens += i32_column(message.token_ids)[at:at + counts[i]].tolist()
                        finish = Finish(message.finish[i]) or finish
                    at += counts[i]
        return tokens, finish

    # --- as the loop and the worker ---

    def plan(self) -> StepPlan | None:
        self.now_ns += 1
        plan = self.core.schedule(self.now_ns) if self.core.wants_plan(self.now_ns) else None
        if plan is not None:
            self.plans.append(plan)
        return plan

    def answer(self, status: StepStatus = StepStatus.OK, token: int | list[int] | None = None,
               row_errors: list[tuple[int, int]] = (), good_before: int = 0, prompt_logprobs: PromptLogprobRows | None = None,
               took_us: int | None = None) -> None:
        """The result of the oldest plan: every row that samples gets ``token``, or counts up from 100.

        ``token``: one for all, or as many as the plan has steps; ``good_before``: tokens that rows with
        an error gave before it.  ``took_us``: how long the worker says it took; the time that has
        really passed is the test's.
        """
        plan = self.plans.pop(0)
        result = StepResult(1, 1, plan.step_id, status)
        if status is StepStatus.OK:
            step = self.core.steps[0]
            out = step.samples.copy()
            if step.num_drafts is not None:
                drafts = np.split(i32_column(plan.drafts), np.cumsum(step.num_drafts)[:-1])
                out = np.array([self._num_right(step, at, own.tolist(), token) for at, own in enumerate(drafts)], np.int32)
            out[[at for at, _ in row_errors]] = good_before
            values = [self._token(step, at, number, token) for at, count in enumerate(out) for number in range(count)]
            result = StepResult(1, 1, plan.step_id, status, i32_bytes(out), i32_bytes(values),
                                row_errors=i32_bytes([v for pair in row_errors for v in pair]) if row_errors else None,
                                prompt_logprobs=prompt_logprobs, timings_us=None if took_us is None else i32_bytes([0, 0, 0, took_us]))
        self.now_ns += 1
        self.core.apply(result, self.now_ns)

    def _token(self, step: Any, at: int, number: int, token: int | list[int] | None) -> int:
        if token is not None:
            return token if isinstance(token, int) else token[number]
        position = int(step.starts[at] + step.num_tokens[at] - step.samples[at]) + 1 + number
        return 100 + position % self.period

    def _num_right(self, step: Any, at: int, drafts: list[int], token: int | list[int] | None) -> int:
        """Tokens of an entry: one, and one more for each draft until the first wrong one."""
        count = 1
        while count <= len(drafts) and drafts[count - 1] == self._token(step, at, count - 1, token):
            count += 1
        return min(count, int(step.samples[at]))

    def step(self, **answer: Any) -> StepPlan | None:
        """One plan and one result; the plan, or the one answered where the window was full."""
        plan = self.plan() or (self.plans[0] if self.plans else None)
        if plan is not None:
            self.answer(**answer)
        return plan

    def run(self, limit: int = 500) -> int:
        """Until nothing is left; the number of steps."""
        for count in range(limit):
            if self.step() is None:
                assert len(self.core.live) == 0, "stuck"
                return count
        raise AssertionError("does not end")

    def rows_of(self, plan: StepPlan) -> dict[int, tuple[int, int]]:
        """Request number → (tokens computed before, tokens of this step), by the rows as they are now."""
        found = {}
        for row, start, count in zip(i32_column(plan.rows), i32_column(plan.num_computed), i32_column(plan.num_tokens), strict=True):
            request = self.core.rows.request[row]
            found[int.from_bytes(request.key, "big")] = (int(start), int(count))
        return found

    def check(self) -> None:
        """No block is leaked, counters agree."""
        columns = self.core.rows
        holders = [0] * self.core.kv.pool.num_blocks
        for request in self.core.live.running:
            for block_id in columns.blocks_of(request.req_idx):
                holders[block_id] += 1
        self.core.kv.pool.check_integrity(holders)
        rows = self.core.live.order
        assert [columns.request[row] for row in rows] == self.core.live.running
        assert (columns.num_applied[rows] <= columns.num_computed[rows]).all()
        assert (columns.published[rows] * columns.block_size <= np.minimum(columns.num_applied[rows], columns.num_tokens[rows])).all()
