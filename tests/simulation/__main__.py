"""``python -m tests.simulation --seeds 10000 --first 0``: any number of seeds, on all cores."""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
from simulation.runner import run_seeds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="how many beside each other")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    reached, failures = run_seeds(arguments.first, arguments.seeds, arguments.processes)
    for name, count in sorted(reached.items()):
        print(f"{count:10d}  {name}")
    print(f"{time.monotonic() - started_s:.1f} s, {len(failures)} failures")
    for seed, reason in failures[:20]:
        print(f"seed {seed}: {reason}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
