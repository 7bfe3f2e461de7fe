"""CPU time of an idle engine: all processes together, percent of one core.

    python benchmarks/idle.py
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from folovllm import LLMEngine, SamplingParams
from frontend.status import read_status


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to watch (default: 10)")
    arguments = parser.parse_args()
    with LLMEngine() as engine:
        engine.generate("Hello", SamplingParams(max_tokens=8))
        pids = {process["role"]: process["pid"] for process in read_status(engine.run_dir)["processes"]}
        before = {role: cpu_s(pid) for role, pid in pids.items()}
        time.sleep(arguments.seconds)
        used = {role: cpu_s(pid) - before[role] for role, pid in pids.items()}
    print("  ".join(f"{role} {seconds:.2f} s" for role, seconds in used.items()))
    print(f"together {100 * sum(used.values()) / arguments.seconds:.2f} % over {arguments.seconds:.0f} s")


if __name__ == "__main__":
    main()
