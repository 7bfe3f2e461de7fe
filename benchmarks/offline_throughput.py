"""All of workload W at once through ``LLMEngine`` against transformers' ``generate`` one by one, in one run.

    python benchmarks/offline_throughput.py

``offline_width.py`` at width 64 with that one peer: both in bfloat16 on the same threads, greedy,
EOS ignored, prefix cache off, warmed, alternating three times; medians.  transformers gets the
first 8 requests of W, which its rate does not depend on.  Other flags may follow.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import harness
import offline_width


def main(argv: list[str]) -> None:
    offline_width.main(["--widths", "64", "--with", "transformers", "--ours", harness.BF16, *argv], "offline_throughput", __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
