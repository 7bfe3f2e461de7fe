"""One stream: the first 8 requests of workload W, one after another, ours beside the peers.

    python benchmarks/single_stream.py --peers DIR

"Whole" is output tokens over all of the time, prefill included.  "Decode alone" takes the time
of the same prompts with one output token each, measured right before, off both.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import harness
from engines import Engine
from report import Metric
from workload import make_workload

WHOLE, DECODE = Metric("whole", "tokens/s"), Metric("decode alone", "tokens/s")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--requests", type=int, default=8, help="of workload W (default: 8)")
    parser.add_argument("--output-tokens", type=int, help="of each request, instead of W's 32 to 128")
    arguments = parser.parse_args()
    work = [(prompt, arguments.output_tokens or count) for prompt, count in make_workload(arguments.requests)]
    report = harness.new_report("single_stream", "requests", [WHOLE, DECODE], arguments)

    def measure(engine: Engine) -> dict[str, float]:
        return harness.whole_and_decode(engine, work, WHOLE.name, DECODE.name)

    with harness.Session(arguments, report) as session:
        session.load(width=1)
        session.alternate(f"first {len(work)} of W", measure)
    report.finish(arguments.out)


if __name__ == "__main__":
    main()
