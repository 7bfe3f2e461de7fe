"""Where each millisecond of a decode step goes: 64 rows at a context of 174 tokens.

    python benchmarks/step_profile.py --ours "bf16: dtype=bfloat16" --ours "int8: quantization=int8"

Parts of the step by the worker's own timings, the forward pass split by timers around products
and attention (within the kernels where it is one call), operators by torch's profiler, and the
speed of the layers' products against a 2,048³ ``torch.mm`` in the same process.  No peers: what
happens in them cannot be split alike.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import harness
from child import Child, ChildFailed
from engines import LOAD_TIMEOUT_S, RUN_TIMEOUT_S, Mode, NotRunning, OurEngine, Result, Target
from launch import environment
from report import Metric, header, row
from workload import Work

TIME, SHARE = Metric("time", "ms a step", higher_is_better=False, digits=2), Metric("share", "% of the step")
SHOWN_OPERATORS = 15


class StepEngine:
    """One mode of ours in ``step_worker.py``."""

    is_ours, one_at_a_time = True, False

    def __init__(self, mode: Mode, logs: Path) -> None:
        self.name, self._mode, self._logs = mode.name, mode, logs
        self._child: Child | None = None

    def load(self, target: Target, width: int, serving: bool = False) -> dict[str, Any]:
        script = Path(__file__).resolve().parent / "step_worker.py"
        self._child = Child([sys.executable, str(script)], environment("worker"), self._logs / f"step_{self.name.replace(' ', '_')}.log")
        return self.ask("load", LOAD_TIMEOUT_S, checkpoint=str(target.checkpoint), flags=OurEngine(self._mode).flags(target, width))

    def run(self, work: Work, one_by_one: bool = False) -> Result:
        raise NotImplementedError("it runs steps, not requests")

    def ask(self, op: str, timeout_s: float = RUN_TIMEOUT_S, **fields: Any) -> Any:
        try:
            return self._child.ask(op, timeout_s, **fields)
        except ChildFailed as error:
            raise NotRunning(str(error)) from None

    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def parts_ms(found: dict[str, Any]) -> dict[str, float]:
    """The step in parts that add up; the last is a series without timers, for comparison."""
    parts, split = found["parts"], found["split"]
    return {
        "build": parts["build"], "products of the layers": split["products"], "attention": split["attention"],
        "rest of the forward pass": parts["forward"] - split["products"] - split["attention"],
        "head": split["head"], "sampling": parts["sample"] - split["head"], "whole step": parts["whole step"],
        "whole step without timers": found["plain_ms"],
    }


def main() -> None:
    parser = harness.parser(__doc__, ours=[harness.BF16], peers=[])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--context", type=int, default=174, help="tokens, on average over the steps (default: 174)")
    parser.add_argument("--steps", type=int, default=20, help="of each series and round (default: 20)")
    parser.add_argument("--traced-steps", type=int, default=5, help="under torch's profiler (default: 5)")
    arguments = parser.parse_args()
    report = harness.new_report("step_profile", "part", [TIME, SHARE], arguments, wide=True)
    engines = [StepEngine(mode, arguments.out / "logs") for mode in harness.modes(arguments)]
    last: dict[str, dict[str, Any]] = {}
    with harness.Session(arguments, report, engines) as session:
        session.load(arguments.rows, warm=False)

        def measure(engine: StepEngine) -> dict[str, float]:
            found = engine.ask("profile", rows=arguments.rows, context=arguments.context, steps=arguments.steps,
                               traced_steps=arguments.traced_steps)
            found["peak"] = engine.ask("peak")
            last[engine.name] = found
            whole_ms = found["parts"]["whole step"]
            number = len(report.values("whole step", engine.name, TIME.name))
            for part, ms in parts_ms(found).items():
                report.add(part, engine.name, TIME.name, ms, number)
                report.add(part, engine.name, SHARE.name, 100 * ms / whole_ms, number)
            products = found["split"]["products"] + found["split"]["head"]
            return {"share of all products, %": 100 * products / whole_ms, "products of the layers, GFLOP/s": found["gflops"],
                    f"torch.mm {found['peak']['dtype']}, GFLOP/s": found["peak"]["gflops"],
                    "products of the layers against torch.mm, %": 100 * found["gflops"] / found["peak"]["gflops"]}

        session.alternate("summary", measure)
    for name, found in last.items():
        report.sections.append(summary(report, name) + "\n\n" + operators(name, found))
        report.engines[name]["last_round"] = found
    report.finish(arguments.out)


def summary(report: Any, name: str) -> str:
    """Medians of what has no part of its own."""
    metrics = list(dict.fromkeys(s.metric for s in report.samples if s.case == "summary" and s.engine == name))
    lines = [header(name, "median")]
    lines += [row(metric, f"{statistics.median(report.values('summary', name, metric)):.1f}") for metric in metrics]
    return "\n".join(lines)


def operators(name: str, found: dict[str, Any]) -> str:
    lines = [header(f"{name}: operator, by its own time", "ms a step", "calls")]
    lines += [row(entry["name"], f"{entry['ms']:.2f}", f"{entry['calls']:.0f}") for entry in found["operators"][:SHOWN_OPERATORS]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
