"""Many seeds, in several processes; a failing one is reported by its number."""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from simulation.driver import Simulation
from simulation.planted_bugs import plant

Report = tuple[Counter[str], list[tuple[int, str]]]
SHARE = 25                   # seeds that a process takes at a time


def run_range(first: int, count: int) -> Report:
    """(in how many seeds each state was reached, the seeds that failed and why)."""
    reached: Counter[str] = Counter()
    failures = [(seed, reason) for seed in range(first, first + count) if (reason := run_seed(seed, reached)) is not None]
    return reached, failures


def run_seed(seed: int, reached: Counter[str]) -> str | None:
    """Why it failed, if it did."""
    try:
        Simulation(seed, reached).run()
    except Exception as error:    # whatever a core can raise is a finding
        return f"{type(error).__name__}: {error}"
    return None


def finding_seed(bug: str, first: int, count: int) -> int | None:
    """A seed that fails with ``bug`` planted: ``first`` if it does, else the first of ``count`` seeds."""
    with plant(bug):
        return next((seed for seed in (first, *range(count)) if run_seed(seed, Counter()) is not None), None)


def run_seeds(first: int, count: int, processes: int) -> Report:
    """``run_range`` over ``processes`` of them."""
    starts = range(first, first + count, SHARE)
    reached: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    with _pool(processes) as pool:
        for part, failed in pool.map(run_range, starts, [min(SHARE, first + count - s) for s in starts]):
            reached += part
            failures += failed
    return reached, failures


def find_bugs(bugs: dict[str, int], count: int, processes: int) -> dict[str, int | None]:
    """``finding_seed`` of each bug, planted one at a time; with the seed to try first."""
    with _pool(processes) as pool:
        return dict(zip(bugs, pool.map(finding_seed, bugs, bugs.values(), [count] * len(bugs)), strict=True))


def _pool(processes: int) -> ProcessPoolExecutor:
    """Processes of their own: what is planted or silenced there stays there."""
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=logging.disable, initargs=(logging.WARNING,))
