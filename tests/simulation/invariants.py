"""What must hold between any two events."""

from __future__ import annotations

import numpy as np

from core_proc.engine_core import EngineCore
from core_proc.request import RequestStatus


def check(core: EngineCore) -> None:
    """AssertionError names what does not hold."""
    rows, live = core.rows, core.live
    order = live.order
    assert [rows.request[row] for row in order] == live.running, "order and running are parallel"
    keys = [request.order for request in live.running]
    assert keys == sorted(keys), "running in the total order"
    waiting = [request.order for request in live.waiting]
    assert waiting == sorted(waiting), "waiting in the total order"
    assert len(live) == len(keys) + len(waiting), "every live request runs or waits"
    assert rows.num_free == rows.max_num_seqs - len(keys), "no row is lost"
    _check_blocks(core)
    _check_counters(core)


def _check_blocks(core: EngineCore) -> None:
    rows = core.rows
    holders = [0] * core.kv.pool.num_blocks
    for request in core.live.running:
        row = request.req_idx
        blocks = rows.blocks_of(row)
        for block_id in blocks:
            holders[block_id] += 1
        assert len(blocks) * rows.block_size >= rows.num_computed[row], "blocks for all computed tokens"
        written = min(int(rows.num_applied[row]), int(rows.num_tokens[row])) // rows.block_size
        assert rows.published[row] <= written, "nothing published that is not confirmed"
    core.kv.pool.check_integrity(holders)


def _check_counters(core: EngineCore) -> None:
    rows = core.rows
    samples, steps, tokens = (np.zeros(rows.max_num_seqs, int) for _ in range(3))
    late: dict[int, list[int]] = {}
    for step in core.steps:
        if step.dead:
            continue
        here = rows.serial[step.rows] == step.serials
        samples[step.rows[here]] += step.samples[here]
        steps[step.rows[here]] += 1
        tokens[step.rows[here]] += step.num_tokens[here]
        for at, request in step.departed.items():
            counts = late.setdefault(id(request), [0, 0])
            counts[0] += int(step.samples[at])
            counts[1] += 1
    for request in core.live:
        if request.status is RequestStatus.RUNNING:
            row = request.req_idx
            assert rows.in_flight[row] == samples[row], "samples in flight"
            assert rows.steps[row] == steps[row], "steps in flight"
            assert rows.num_computed[row] - rows.num_applied[row] == tokens[row], "computed against confirmed"
            assert rows.num_tokens[row] + rows.in_flight[row] <= rows.max_total[row], "no sample past the end"
        else:
            expected = late.get(id(request), [0, 0])
            assert [request.num_in_flight, request.steps_in_flight] == expected, "in flight of a waiting request"
