"""Many seeds, in several processes; a failing one is reported by its number."""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from simulation.driver import Simulation
from simulation.planted_bugs import plant

Report = tuple[Counter[str], list[tuple[int, str]]]


def run_range(first: int, count: int, bug: str | None = None, stop_at_failure: bool = False) -> Report:
    """(how often each state was reached, the seeds that failed and why)."""
    logging.disable(logging.WARNING)     # simulated failures are no news
    reached: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    with plant(bug):
        for seed in range(first, first + count):
            try:
                Simulation(seed, reached).run()
            except Exception as error:    # whatever a core can raise is a finding
                failures.append((seed, f"{type(error).__name__}: {error}"))
                if stop_at_failure:
                    break
    return reached, failures


def run_seeds(first: int, count: int, processes: int) -> Report:
    """The same over ``processes`` of them."""
    share = 50
    starts = range(first, first + count, share)
    reached: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for part, failed in pool.map(run_range, starts, [min(share, first + count - s) for s in starts]):
            reached += part
            failures += failed
    return reached, failures
