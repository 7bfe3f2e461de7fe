"""What a figure was measured on, and whether anything else was running."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe() -> str:
    """CPU, cores, kernel, versions of what computes."""
    import importlib.metadata

    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    isa = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    return (f"{names[0]}, {len(os.sched_getaffinity(0))} cores, {' '.join(isa)}, Python {platform.python_version()},"
            f" torch {importlib.metadata.version('torch')}")


def pressure() -> float:
    """Percent of the last 10 s in which something waited for a CPU."""
    return float(Path("/proc/pressure/cpu").read_text().split("avg10=")[1].split()[0])
