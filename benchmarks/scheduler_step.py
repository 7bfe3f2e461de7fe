"""Microseconds of the core's work in one step, by the number of running requests.

    python benchmarks/scheduler_step.py

Per step: schedule, encode the plan, decode it (the worker's part), encode the result, decode
it, apply, encode the outputs, decode them (the frontend's part).  Prefix cache on, stop ids
set, blocks growing (requests stand at all places of a block), and in every step one request
ends and one is admitted.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from core_proc.engine_core import EngineCore
from protocol.codec import i32_bytes
from protocol.config import SchedulerConfig
from protocol.messages import Add, to_frontend
from protocol.sampling_params import TokenParams
from protocol.steps import StepResult, StepStatus, WorkerReady, to_core, to_worker

FRONTEND = b"f0.e1"
PROMPT_TOKENS = 64
VOCAB = 50_000
NEVER = 49_999               # a stop id that is not sampled


class Bench:
    """A core with ``running`` requests, one of which ends in each step."""

    def __init__(self, running: int) -> None:
        config = SchedulerConfig(max_num_seqs=running, max_num_batched_tokens=running * (PROMPT_TOKENS + 1), max_num_queued_reqs=10 * running)
        self.running, self.now_ns, self.seq, self.number = running, 1, 0, 0
        self.core = EngineCore(config, WorkerReady(1, 1, "f", running * 64, running, VOCAB, b"", [], 2048))
        self.core.connect(FRONTEND, self.now_ns)
        for i in range(running):
            self.add(max_tokens=i + 8)
        self.step()

    def add(self, max_tokens: int) -> None:
        self.number += 1
        self.seq += 1
        tokens = np.random.default_rng(self.number).integers(0, VOCAB - 1, PROMPT_TOKENS)
        params = TokenParams(max_tokens=max_tokens, stop_token_ids=i32_bytes([NEVER]), eos_token_ids=i32_bytes([NEVER - 1]))
        self.core.handle(FRONTEND, Add(
            self.seq, self.number.to_bytes(16, "big"), self.number, 0, 0, 0, False, self.now_ns, i32_bytes(tokens), b"", params,
            self.number, 0, b"c", b""), self.now_ns)

    def step(self) -> float:
        """Seconds of one step, the worker's own work left out."""
        self.now_ns += 1
        started_s = time.perf_counter()
        frame = to_worker.encode(self.core.schedule(self.now_ns))
        plan = to_worker.decode(frame)
        first_s = time.perf_counter() - started_s
        samples = self.core.steps[-1].samples
        ids = np.random.default_rng(plan.step_id).integers(0, NEVER - 1, int(samples.sum()), dtype=np.int32)
        num_out = samples
        started_s = time.perf_counter()
        frame = to_core.encode(StepResult(1, 1, plan.step_id, StepStatus.OK, i32_bytes(num_out), i32_bytes(ids),
                                            timings_us=i32_bytes([100, 40_000, 900, 41_000])))
        self.core.apply(to_core.decode(frame), self.now_ns)
        for _, message in self.core.take_outputs():
            to_frontend.decode(to_frontend.encode(message))
        return first_s + time.perf_counter() - started_s


def measure(running: int, steps: int) -> list[float]:
    bench = Bench(running)
    times = []
    gc.collect()
    gc.freeze()
    for i in range(steps):
        bench.add(max_tokens=running + 8)      # as long as a full turn: one ends in each step
        times.append(bench.step())
        assert len(bench.core.live.running) >= running - 1, "the batch is not full"
    return times[steps // 5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[16, 64, 256, 1024], help="running requests")
    parser.add_argument("--steps", type=int, default=400, help="steps measured at each size")
    arguments = parser.parse_args()
    print("| running | median µs a step | 90th percentile |\n|---|---|---|")
    for running in arguments.running:
        times = sorted(measure(running, arguments.steps))
        print(f"| {running} | {1e6 * statistics.median(times):.0f} | {1e6 * times[int(0.9 * len(times))]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
