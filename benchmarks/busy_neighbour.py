"""How much longer tokens take beside a busy neighbour: one thread of somebody else's on one of the cores.

    python benchmarks/busy_neighbour.py --peers DIR

A kernel's threads meet several times in each layer; where they spin for long, or hand out work in
equal parts, a thread that shares its core holds up all others.  On two cores, half of one of
which is somebody else's, 1.33 times longer is what is left of the machine.  Decode alone: as
in ``single_stream.py``, with all requests of a case at once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import harness
from engines import Engine
from report import Metric
from workload import Work, make_workload, prefills

ALONE, BESIDE = (Metric(name, "ms a step", higher_is_better=False) for name in ("alone", "beside a busy thread"))
LONGER = Metric("longer", "times", higher_is_better=False, digits=2)
BUSY = "import os, sys, time\nos.sched_setaffinity(0, {int(sys.argv[1])})\nend_s = time.monotonic() + 600\nwhile time.monotonic() < end_s: pass"


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """On the last of our cores, at ordinary priority, while the block runs."""
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(max(os.sched_getaffinity(0)))])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def ms_a_step(engine: Engine, work: Work) -> float:
    """Of decode: all of ``work`` at once, without the time of its prefills; its requests are equally long."""
    first, whole = engine.run(prefills(work)), engine.run(work)
    return 1000 * (whole.seconds - first.seconds) / (work[0][1] - 1)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 16], help="requests at once (default: 1 16)")
    parser.add_argument("--output-tokens", type=int, default=64, help="of each request (default: 64)")
    arguments = parser.parse_args()
    report = harness.new_report("busy_neighbour", "requests", [ALONE, BESIDE, LONGER], arguments, wide=True)
    with harness.Session(arguments, report) as session:
        session.load(width=max(arguments.widths))
        for width in arguments.widths:
            work = [(prompt, arguments.output_tokens) for prompt, _ in make_workload(width)]

            def measure(engine: Engine, work: Work = work) -> dict[str, float]:
                alone = ms_a_step(engine, work)
                with busy_thread():
                    beside = ms_a_step(engine, work)
                return {ALONE.name: alone, BESIDE.name: beside, LONGER.name: beside / alone}

            session.alternate(width, measure, warm_ups=1)
    report.finish(arguments.out)


if __name__ == "__main__":
    main()
