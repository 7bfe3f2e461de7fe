"""What was decided, as the worker reads it.

Called by ``EngineCore.schedule``.
"""

from __future__ import annotations

import numpy as np

from core_proc.live_requests import LiveRequests
from core_proc.request import Request
from core_proc.step import ScheduledStep, Step
from protocol.codec import i32_bytes
from protocol.steps import Admission, StepPlan


def build_plan(epoch: int, gen: int, step: Step, scheduled: ScheduledStep, live: LiveRequests,
               restart_after: int | None) -> StepPlan:
    """The plan of ``step``.  After a failed one the worker has forgotten its rows: all are admitted anew."""
    admitted, grow = scheduled.admitted, scheduled.grow
    if restart_after is not None:
        admitted, grow = live.running, np.empty((0, 2), np.int32)
    return StepPlan(
        epoch, gen, step.step_id, restart_after, [_admission(live, request) for request in admitted],
        i32_bytes(grow), i32_bytes(step.rows.astype(np.int32)), i32_bytes(step.starts), i32_bytes(scheduled.num_tokens),
        num_steps=step.num_steps, num_drafts=None if scheduled.num_drafts is None else i32_bytes(scheduled.num_drafts),
        drafts=None if scheduled.drafts is None else i32_bytes(scheduled.drafts))


def _admission(live: LiveRequests, request: Request) -> Admission:
    """The worker begins with what has been confirmed: nothing of the row is under way before this plan."""
    columns, row = live.rows, request.req_idx
    return Admission(
        row, columns.tokens[row, :columns.num_tokens[row]].tobytes(), request.prompt_len,
        int(columns.num_applied[row]), i32_bytes(columns.block_table[row, :columns.num_blocks[row]]),
        request.params, request.seed)
