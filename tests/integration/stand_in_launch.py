"""Stands in for launch.py: a frontend with a fake core, no model; same pipes, same flags.

``--model=broken`` reports an error, ``--model=silent`` dies without a word.  Writes its pid
into its run directory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from frontend_harness import FrontendHarness  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--run-dir", "--model", "--max-num-seqs"):
        parser.add_argument(flag)
    for flag in ("--death-pipe-fd", "--parent-report-fd", "--seed"):
        parser.add_argument(flag, type=int)
    arguments = parser.parse_args()
    if arguments.model == "silent":
        sys.exit(3)
    report = {"error": "model: was 'broken'"} if arguments.model == "broken" else {"ready": True}
    if "ready" in report:
        harness = FrontendHarness(Path(arguments.run_dir)).start()
        if arguments.max_num_seqs:
            report["max_num_seqs"] = arguments.max_num_seqs
    os.write(arguments.parent_report_fd, json.dumps(report).encode() + b"\n")
    if "error" in report:
        sys.exit(1)
    os.read(arguments.death_pipe_fd, 1)
    harness.stop()
    harness.run_dir.lock_file.unlink()


if __name__ == "__main__":
    main()
