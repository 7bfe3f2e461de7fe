"""Several decode steps in one plan, where nobody waits for the worker meanwhile.

Called by the scheduler last, on a step that it has decided.  A short step costs more in
messages than it gains by being the newest, so the worker runs a plan of plain decodes
``num_steps`` times over.  Every counter advances by as many; blocks come from the free ones
only, and nobody is preempted for it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from core_proc.live_requests import LiveRequests
from core_proc.step import ScheduledStep


def run_ahead(live: LiveRequests, step: ScheduledStep, most: int) -> ScheduledStep:
    """``step``, to be run up to ``most`` times; the first time has been counted already."""
    if most == 1 or len(live.waiting) or step.admitted or step.preempted or not _decodes_only(step):
        return step
    rows, columns = step.rows, live.rows
    may_sample = columns.max_total[rows] - columns.num_tokens[rows] - columns.in_flight[rows]
    more = min(most - 1, int(may_sample.min()))
    while more > 0 and int((missing := live.kv.missing(rows, more)).sum()) > live.kv.num_free:
        more -= 1
    if more <= 0:
        return step
    columns.num_computed[rows] += more
    columns.in_flight[rows] += more
    grow = np.concatenate([step.grow, live.kv.grow(rows, missing)])
    return replace(step, grow=grow, num_steps=1 + more)


def _decodes_only(step: ScheduledStep) -> bool:
    return len(step.rows) > 0 and bool(step.samples.all()) and bool((step.num_tokens == 1).all())
