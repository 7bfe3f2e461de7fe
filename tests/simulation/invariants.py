"""What must hold between any two events."""

from __future__ import annotations

from core_proc.engine_core import EngineCore
from core_proc.request import RequestStatus


def check(core: EngineCore) -> None:
    """AssertionError names what does not hold."""
    rows, live = core.rows, core.live
    running, waiting = live.running, list(live.waiting)
    order = live.order.tolist()
    assert [rows.request[row] for row in order] == running, "order and running are parallel"
    assert [request.req_idx for request in running] == order, "a request knows its row"
    for requests in (running, waiting):
        keys = [request.order for request in requests]
        assert keys == sorted(keys), "the total order"
    assert len(live) == len(running) + len(waiting), "every live request runs or waits"
    assert sorted(rows._free + order) == list(range(rows.max_num_seqs)), "no row is lost"
    _check_blocks(core, order)
    _check_counters(core)
    _check_delivery(core)


def check_end(core: EngineCore) -> None:
    """Nobody is left: nor is anything of theirs."""
    check(core)
    assert not len(core.live) and not core.steps, "somebody is left"
    assert core.kv.num_free == core.kv.pool.num_blocks, "a block was leaked"
    assert not core.kv._writers, "a writer is remembered"
    assert not core.suspects._strikes and not core.suspects._alone, "a strike is remembered"
    assert core.suspects.on_trial() is None


def _check_blocks(core: EngineCore, order: list[int]) -> None:
    rows, size = core.rows, core.rows.block_size
    holders = [0] * core.kv.pool.num_blocks
    columns = (rows.num_blocks, rows.num_computed, rows.num_applied, rows.num_tokens, rows.published, rows.highest)
    for row in order:
        held, computed, applied, known, published, highest = (int(column[row]) for column in columns)
        for block_id in rows.block_table[row, :held].tolist():
            holders[block_id] += 1
        assert held * size >= computed, "blocks for all computed tokens"
        assert applied <= computed and applied <= known, "confirmed is computed and known"
        assert published == min(applied, known) // size, "published is what is confirmed, no more and no less"
        assert highest <= known, "the furthest is known"
    core.kv.pool.check_integrity(holders)


def _check_counters(core: EngineCore) -> None:
    rows = core.rows
    serials = rows.serial.tolist()
    here: dict[int, list[int]] = {}          # row → samples, steps, tokens under way
    late: dict[int, list[int]] = {}          # request that left its row → samples, steps
    for step in core.steps:
        if step.dead:
            continue
        columns = (step.rows.tolist(), step.serials.tolist(), step.samples.tolist(), step.num_tokens.tolist())
        for at, (row, serial, sample, tokens) in enumerate(zip(*columns, strict=True)):
            if serials[row] == serial:
                counts = here.setdefault(row, [0, 0, 0])
                counts[2] += tokens
            elif at in step.departed:
                counts = late.setdefault(id(step.departed[at]), [0, 0])
            else:
                raise AssertionError("a row under way belongs to nobody")
            counts[0] += sample
            counts[1] += 1
    for request in core.live:
        row = request.req_idx
        if request.status is RequestStatus.RUNNING:
            counts = [int(rows.in_flight[row]), int(rows.steps[row]), int(rows.num_computed[row] - rows.num_applied[row])]
            assert counts == here.get(row, [0, 0, 0]), "samples, steps, tokens in flight"
            assert rows.num_tokens[row] + rows.in_flight[row] <= rows.max_total[row], "no sample past the end"
        else:
            assert request.status is RequestStatus.WAITING and row == -1
            assert [request.num_in_flight, request.steps_in_flight] == late.get(id(request), [0, 0]), "in flight of one that waits"
            assert request.num_tokens + request.num_in_flight <= request.max_total_tokens, "no sample past the end"


def _check_delivery(core: EngineCore) -> None:
    """Nobody owes a frontend tokens that are due."""
    rows = core.rows
    for request in core.live:
        row = request.req_idx
        if row >= 0:
            known, sent, due = int(rows.num_tokens[row]), int(rows.sent[row]), int(rows.emit_at[row])
        else:
            known, sent, due = request.num_tokens, request.sent_tokens, request.emit_at
        assert known < due or known == sent, "tokens that are due"
        assert request.channel.streams.get(request.stream) is request, "its channel knows it"
