"""Microseconds of the core's work in one step, by the number of running requests, beside vLLM's scheduler.

    python benchmarks/scheduler_step.py --peers DIR

Ours, per step: schedule, encode the plan, decode it (the worker's part), encode the result, decode
it, apply, encode the outputs, decode them (the frontend's part).  Prefix cache on, stop ids
set, blocks growing (requests stand at all places of a block), and in every step one request
ends and one is admitted.  vLLM's: ``schedule`` and ``update_from_output`` alone, nothing encoded,
nobody coming or going.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from child import Child, ChildFailed
from core_proc.engine_core import EngineCore
from gpu_worker.models.default_model import directory
from harness import RESULTS
from peer_process import ADAPTERS, PEERS
from percentiles import percentile
from protocol.codec import i32_bytes
from protocol.config import SchedulerConfig
from protocol.messages import Add, to_frontend
from protocol.sampling_params import TokenParams
from protocol.steps import StepResult, StepStatus, WorkerReady, to_core, to_worker
from report import Metric, Report, progress

FRONTEND = b"f0.e1"
PROMPT_TOKENS = 64
VOCAB = 50_000
NEVER = 49_999               # a stop id that is not sampled
OURS, VLLM = "FoloVLLM's core, with all coding", "vLLM's scheduler"
MEDIAN, NINETIETH = (Metric(name, "µs a step", higher_is_better=False, digits=0) for name in ("median", "90th percentile"))
TIMEOUT_S = 600.0


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


class Ours:
    """One core for each number of running requests."""

    def __init__(self, settle_steps: int) -> None:
        self._benches: dict[int, Bench] = {}
        self._settle_steps = settle_steps

    def steps(self, running: int, count: int) -> list[float]:
        """Seconds of single steps."""
        if running not in self._benches:
            self._benches[running] = Bench(running)
            gc.collect()
            gc.freeze()
            self._run(running, self._settle_steps)
        return self._run(running, count)

    def _run(self, running: int, count: int) -> list[float]:
        bench, times_s = self._benches[running], []
        for _ in range(count):
            bench.add(max_tokens=running + 8)      # as long as a full turn: one ends in each step
            times_s.append(bench.step())
            assert len(bench.core.live.running) >= running - 1, "the batch is not full"
        return times_s


class VLLMScheduler:
    """vLLM's, in its own process; ``reason`` says why there is none."""

    def __init__(self, peers: Path | None, logs: Path) -> None:
        peer = PEERS["vllm"]
        self.reason, self.about, self._child = peer.why_not(peers), {}, None
        if self.reason is None:
            self._child = Child([peer.python(peers), str(ADAPTERS / "vllm_scheduler.py")], peer.environment(peers), logs / "vllm_scheduler.log")
            try:
                self.about = self._child.ask("load", TIMEOUT_S, checkpoint=str(directory()))
            except ChildFailed as error:
                self.reason = str(error)

    def steps(self, running: int, count: int) -> list[float]:
        """Seconds of single steps; raises ChildFailed."""
        return self._child.ask("steps", TIMEOUT_S, running=running, count=count)["seconds"]

    def close(self) -> None:
        if self._child is not None:
            self._child.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[16, 64, 256, 1024], help="running requests")
    parser.add_argument("--steps", type=int, default=100, help="steps of each size in a round (default: 100)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds, ours and vLLM's in turn (default: 4)")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where peers/install.sh has put vllm")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the JSON file, the plot and vLLM's log")
    arguments = parser.parse_args()
    report = Report("scheduler_step", "running", [MEDIAN, NINETIETH], {key: str(value) for key, value in vars(arguments).items()}, bases=[VLLM])
    ours, theirs = Ours(arguments.steps), VLLMScheduler(arguments.peers, arguments.out / "logs")
    engines = {OURS: ours}
    if theirs.reason is None:
        engines = {VLLM: theirs, OURS: ours}
    else:
        report.missing[VLLM] = theirs.reason
    report.engines = {name: theirs.about if name == VLLM else {} for name in engines}
    try:
        for running in arguments.running:
            for number in range(arguments.rounds):
                for name in list(engines):
                    progress(f"scheduler_step, {running} running, round {number + 1}: {name}")
                    try:
                        times_s = engines[name].steps(running, arguments.steps)
                    except ChildFailed as error:
                        report.missing[name] = str(error)
                        del engines[name]
                        continue
                    report.add(running, name, MEDIAN.name, 1e6 * statistics.median(times_s), number)
                    report.add(running, name, NINETIETH.name, 1e6 * percentile(times_s, 90), number)
    finally:
        theirs.close()
    report.finish(arguments.out)


if __name__ == "__main__":
    main()
