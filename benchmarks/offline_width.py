"""Workload W against the number of requests that run at once, ours beside the peers.

    python benchmarks/offline_width.py --peers DIR

Greedy, EOS ignored, prefix caches off, the same token ids, lengths and threads; each engine's
own scheduler limits the width, except at 1, where requests are handed in one after another.
An engine without batches (transformers) gets the first 8 requests, which its rate does not
depend on, and is measured at width 1 and at the largest.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import harness
from engines import Engine
from report import Metric
from workload import make_workload

RATE = Metric("output tokens", "tokens/s")
FEW = 8                      # requests for an engine that takes them one by one


def main(argv: list[str] | None = None, name: str = "offline_width", doc: str = __doc__) -> None:
    """``name`` and ``doc``: of the benchmark that this one is with chosen flags."""
    parser = harness.parser(doc)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 4, 16, 64], help="requests at once (default: 1 4 16 64)")
    parser.add_argument("--requests", type=int, default=64, help="of workload W (default: 64)")
    parser.add_argument("--requests-at-1", type=int, default=16, help="at width 1, where all of W takes minutes (default: 16)")
    parser.add_argument("--output-tokens", type=int, help="of each request, instead of W's 32 to 128")
    arguments = parser.parse_args(argv)
    work = [(prompt, arguments.output_tokens or count) for prompt, count in make_workload(arguments.requests)]
    report = harness.new_report(name, "width", [RATE], arguments)
    report.note(f"width 1: the first {arguments.requests_at_1} requests of W, one after another; others: all {arguments.requests} at once")
    with harness.Session(arguments, report) as session:
        loaded = 0
        for width in sorted(arguments.widths, reverse=True):
            if width != 1 or not loaded:       # an engine loaded for many takes one as well
                session.load(width)
                loaded = width

            def measure(engine: Engine, width: int = width) -> dict[str, float]:
                if engine.one_at_a_time:
                    return {RATE.name: engine.run(work[:FEW], one_by_one=True).rate} if width in (1, max(arguments.widths)) else {}
                if width == 1:
                    return {RATE.name: engine.run(work[:arguments.requests_at_1], one_by_one=True).rate}
                return {RATE.name: engine.run(work).rate}

            session.alternate(width, measure, warm_ups=0 if width == 1 else 1)
    report.finish(arguments.out)


if __name__ == "__main__":
    main()
