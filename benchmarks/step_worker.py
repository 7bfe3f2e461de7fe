"""The worker's half of ``step_profile.py``: an engine in one process, without sockets.

A child that answers JSON lines.  The real core plans, the real model runner runs; the time of a
step is split by the runner's own timings, by timers around the model's products and attention,
and by torch's profiler; the profiler, which disturbs the rest, has steps of its own.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent / "peers")]
from json_lines import serve

from gpu_worker.process import PRIMITIVE_CACHE

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVE_CACHE)     # read when torch is imported, below
import msgspec
import numpy as np
import torch

from core_proc.engine_core import EngineCore
from gpu_worker.startup import load_worker
from matrix_peak import bf16_products, peak_gflops
from protocol import config as settings
from protocol.codec import i32_bytes, i32_column
from protocol.messages import Add
from protocol.sampling_params import TokenParams
from protocol.steps import StepPlan, StepStatus, WorkerReady
from step_timers import KernelRecorder, StepTimers

FRONTEND = b"f0.e1"
PARTS = ("build", "forward", "sample", "whole step")      # of StepResult.timings_us
WARM_STEPS = 4


class StepWorker:
    """One mode of ours, loaded once."""

    def load(self, checkpoint: str, flags: dict[str, Any]) -> dict[str, Any]:
        config = msgspec.structs.replace(settings.from_values({**flags, "max_decode_steps": 1}), model_dir=checkpoint)    # a plan is a step
        self.recorder = KernelRecorder.install()
        self.worker, self.config = load_worker(config), config
        model = self.worker.runner.model
        return {"dtype": self.worker.dtype, "threads": self.worker.num_threads, "attention": model.attention.name,
                "backend": model.spec.backend}

    def peak(self) -> dict[str, Any]:
        """Of a 2,048³ product in bfloat16, or in float32 where the CPU has no bfloat16 products."""
        dtype = torch.bfloat16 if bf16_products() else torch.float32
        return {"dtype": str(dtype).removeprefix("torch."), "gflops": peak_gflops(dtype)}

    def profile(self, rows: int, context: int, steps: int, traced_steps: int) -> dict[str, Any]:
        """Milliseconds a step, by part; decodes of ``rows`` requests around ``context`` tokens."""
        model = self.worker.runner.model
        run = _Run(self.worker, self.config, rows, max(1, context - (2 * steps + traced_steps) // 2), 2 * (steps + WARM_STEPS) + traced_steps)
        plain = [run.step() for _ in range(steps)]
        timers = StepTimers(model)
        with timers:
            timed = [run.step() for _ in range(steps)]
        split = timers.per_step_ms(steps)
        # products · 2 operations; rows stand at a bucket's size already
        flop = 2 * rows * sum(product.in_features * product.out_features for product in model.linears())
        operators = self._traced(run, traced_steps)
        return {"plain_ms": statistics.median(times["whole step"] for times in plain), "split": split,
                "parts": {part: statistics.mean(times[part] for times in timed) for part in PARTS},      # means add up
                "gflops": flop / split["products"] / 1e6, "operators": operators}

    def _traced(self, run: _Run, steps: int) -> list[dict[str, Any]]:
        """Operators by their own time, from torch's profiler; compiled kernels are among them."""
        if not steps:
            return []
        self.recorder.on = True
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                run.step()
        self.recorder.on = False
        found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        return [{"name": event.key, "ms": event.self_cpu_time_total / 1e3 / steps, "calls": event.count / steps} for event in found[:25]]


class _Run:
    """``rows`` requests that have been prefilled and decode."""

    def __init__(self, worker: Any, config: settings.EngineConfig, rows: int, prompt_tokens: int, steps: int) -> None:
        worker.runner.reset()
        self._runner, self._now_ns = worker.runner, 1
        ready = WorkerReady(1, 1, "", worker.num_blocks, worker.runner.states.max_num_seqs, worker.runner.model.spec.vocab_size, b"", [],
                            worker.max_model_len)
        self._core = EngineCore(config.scheduler, ready)
        self._core.connect(FRONTEND, 1)
        # ends much later than it is looked at: how many tokens a plan may still take must not matter
        params = TokenParams(max_tokens=8 * (steps + rows), temperature=0.0, ignore_eos=True)
        for i in range(rows):
            ids = np.random.default_rng(i).integers(100, 40_000, prompt_tokens)
            self._core.handle(FRONTEND, Add(i + 1, i.to_bytes(16, "big"), i, 0, 0, 0, False, 1, i32_bytes(ids), b"", params, i, 0, b"c", b""), 1)
        while not self._all_decode(self._next()[0], rows):
            pass
        for _ in range(WARM_STEPS):
            self._next()

    def step(self) -> dict[str, float]:
        """Milliseconds of one decode of all rows, by part."""
        plan, timings_us = self._next()
        assert plan.num_steps == 1
        return dict(zip(PARTS, (timings_us / 1e3).tolist()))

    def _next(self) -> tuple[StepPlan, np.ndarray]:
        self._now_ns += 1
        plan = self._core.schedule(self._now_ns)
        result = self._runner.execute(plan)
        if result.status is not StepStatus.OK:
            raise RuntimeError(f"the step failed: {result.detail}")
        self._core.apply(result, self._now_ns)
        self._core.take_outputs()
        return plan, i32_column(result.timings_us)

    @staticmethod
    def _all_decode(plan: StepPlan, rows: int) -> bool:
        num_tokens = i32_column(plan.num_tokens)
        return len(num_tokens) == rows and bool((num_tokens == 1).all())


if __name__ == "__main__":
    serve(StepWorker())
