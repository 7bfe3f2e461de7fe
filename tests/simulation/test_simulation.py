"""CI's share of the simulation; any number of seeds: ``python -m tests.simulation --seeds N``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from protocol.config import SchedulerConfig
from simulation.driver import Simulation
from simulation.observer import RARE_STATES
from simulation.planted_bugs import BUGS
from simulation.reference import Wish, prefixes
from simulation.runner import Report, find_bugs, run_seeds
from simulation.world import BLOCK, World, with_small_blocks

SEEDS = 1000
SEEDS_FOR_EACH_RARE_STATE = 20
FOUND_BY = {"re-admission while a chunk of the request is in flight": 496}      # few seeds find it: that one is tried first
PROCESSES = len(os.sched_getaffinity(0))
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report() -> Report:
    return run_seeds(0, SEEDS, PROCESSES)


@pytest.fixture(scope="module")
def finding_seeds() -> dict[str, int | None]:
    return find_bugs({bug: FOUND_BY.get(bug, 0) for bug in BUGS}, SEEDS, PROCESSES)


def test_no_seed_fails(report):
    reached, failures = report
    assert failures == []
    assert reached["seeds"] == SEEDS
    assert reached["requests"] >= 28 * SEEDS and reached["steps"] >= 100 * SEEDS      # each seed's own are asserted in it


@pytest.mark.parametrize("state", RARE_STATES)
def test_rare_states_are_reached(report, state):
    reached, _ = report
    assert reached[state] >= SEEDS_FOR_EACH_RARE_STATE


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(finding_seeds, bug):
    assert finding_seeds[bug] is not None, f"none of {SEEDS} seeds fails"


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("prompt_len", [1, 4, 5, 21, 24, 25])
@pytest.mark.parametrize(("budget", "window", "max_num_seqs"), [(5, 1, 8), (5, 2, 8), (64, 1, 8), (64, 2, 8), (7, 2, 2)])
def test_children_compute_the_blocks_of_their_prompt_once(enable_prefix_caching, prompt_len, budget, window, max_num_seqs):
    config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, window=window, watermark=0.0,
                             enable_prefix_caching=enable_prefix_caching)
    simulation = Simulation(1, world=World(with_small_blocks(config), num_blocks=60, max_model_len=40, num_requests=0, num_steps=0))
    stored: Counter[int] = Counter()
    store = simulation.worker._store

    def store_and_count(entries):
        for row, start, count, _ in entries:
            stored.update(row.prefixes[start:start + count])
        store(entries)

    simulation.worker._store = store_and_count
    prompt = [(3 * i + 1) % 23 for i in range(prompt_len)]
    simulation.submit([Wish(bytes(16), child, prompt, max_tokens=5, seed=child) for child in range(4)])
    simulation.run()
    shared = (prompt_len - 1) // BLOCK * BLOCK
    assert [stored[prefix] for prefix in prefixes(prompt)] == [1] * shared + [4] * (prompt_len - shared)


LIFE = """
import hashlib, logging, sys
sys.path[:0] = [{root!r}, {tests!r}]
from simulation.driver import Simulation
from protocol.steps import to_worker
logging.disable(logging.WARNING)
digest = hashlib.sha256()
for seed in range(6):
    simulation = Simulation(seed)
    run = simulation.worker.run
    simulation.worker.run = lambda plan: (digest.update(to_worker.encode(plan)), run(plan))[1]
    simulation.run()
print(digest.hexdigest())
print(sorted({{name.split(".")[0] for name in sys.modules}} & {{"torch", "transformers"}}), "libtorch" in open("/proc/self/maps").read())
"""


def live_elsewhere(hash_seed: str) -> list[str]:
    """(digest of all plans of some seeds, torch in memory) in a process of its own."""
    script = LIFE.format(root=str(TESTS.parent), tests=str(TESTS))
    done = subprocess.run([sys.executable, "-c", script], check=True, text=True, stdout=subprocess.PIPE,
                          env={**os.environ, "PYTHONHASHSEED": hash_seed})
    return done.stdout.splitlines()


def test_a_seed_is_the_same_life_in_every_process_and_without_torch():
    digest, torch = live_elsewhere("1")
    assert live_elsewhere("2") == [digest, torch]
    assert torch == "[] False"
