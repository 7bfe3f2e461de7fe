"""What must hold between any two events."""

from __future__ import annotations

from core_proc.engine_core import EngineCore
from core_proc.request import Request, RequestStatus

COLUMNS = ("num_blocks", "num_computed", "num_applied", "num_tokens", "published", "highest", "in_flight", "steps", "max_total", "sent", "emit_at")


def check(core: EngineCore) -> None:
    """AssertionError names what does not hold."""
    rows, live = core.rows, core.live
    running, waiting = live.running, list(live.waiting)
    order = live.order.tolist()
    assert [rows.request[row] for row in order] == running, "order and running are parallel"
    assert [request.req_idx for request in running] == order, "a request knows its row"
    for requests in (running, waiting):
        places = [request.order for request in requests]
        assert places == sorted(places), "the total order"
    assert len(live) == len(running) + len(waiting), "every live request runs or waits"
    assert sorted(rows._free + order) == list(range(rows.max_num_seqs)), "no row is lost"
    columns = {name: getattr(rows, name).tolist() for name in COLUMNS}
    here, late = _under_way(core)
    holders = [0] * core.kv.pool.num_blocks
    for row in order:
        _check_running(core, columns, row, here.get(row, (0, 0, 0)))
        for block_id in rows.block_table[row, :columns["num_blocks"][row]].tolist():
            holders[block_id] += 1
    core.kv.pool.check_integrity(holders)
    for request in waiting:
        _check_waiting(request, late.get(id(request), (0, 0)))
    for request in running + waiting:
        assert request.channel.streams.get(request.stream) is request, "its channel knows it"


def check_end(core: EngineCore) -> None:
    """Nobody is left: nor is anything of theirs."""
    check(core)
    assert not len(core.live) and not core.steps, "somebody is left"
    assert core.kv.num_free == core.kv.pool.num_blocks, "a block was leaked"
    assert not core.kv._writers, "a writer is remembered"
    assert not core.suspects._strikes and not core.suspects._alone, "a strike is remembered"
    assert core.suspects.on_trial() is None
    assert not any(channel.streams or channel._ended for channel in core.channels.values()), "a stream is remembered"


def _under_way(core: EngineCore) -> tuple[dict[int, tuple[int, int, int]], dict[int, tuple[int, int]]]:
    """From the steps in flight: row → (samples, steps, tokens), id of a request that left its row → (samples, steps)."""
    serials = core.rows.serial.tolist()
    here: dict[int, tuple[int, int, int]] = {}
    late: dict[int, tuple[int, int]] = {}
    for step in core.steps:
        if step.dead:
            continue
        columns = (step.rows.tolist(), step.serials.tolist(), step.samples.tolist(), step.num_tokens.tolist())
        for at, (row, serial, samples, tokens) in enumerate(zip(*columns, strict=True)):
            if serials[row] == serial:
                before = here.get(row, (0, 0, 0))
                here[row] = (before[0] + samples, before[1] + 1, before[2] + tokens)
            else:
                assert at in step.departed, "a row under way belongs to nobody"
                before = late.get(id(step.departed[at]), (0, 0))
                late[id(step.departed[at])] = (before[0] + samples, before[1] + 1)
    return here, late


def _check_running(core: EngineCore, columns: dict[str, list[int]], row: int, under_way: tuple[int, int, int]) -> None:
    held, computed, applied, known, published, highest, in_flight, steps, end, sent, due = (columns[name][row] for name in COLUMNS)
    size = core.rows.block_size
    assert held * size >= computed, "blocks for all computed tokens"
    assert applied <= known and highest <= known, "confirmed is known"
    assert published == min(applied, known) // size, "published is what is confirmed, no more and no less"
    assert (in_flight, steps, computed - applied) == under_way, "samples, steps, tokens in flight"
    assert known + in_flight <= end, "no sample past the end"
    assert known < due or known == sent, "tokens that are due"


def _check_waiting(request: Request, under_way: tuple[int, int]) -> None:
    known = request.num_tokens
    assert request.status is RequestStatus.WAITING and request.req_idx == -1
    assert (request.num_in_flight, request.steps_in_flight) == under_way, "in flight of one that waits"
    assert known + request.num_in_flight <= request.max_total_tokens, "no sample past the end"
    assert known < request.emit_at or known == request.sent_tokens, "tokens that are due"
