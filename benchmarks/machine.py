"""What a figure was measured on, and whether anything else was running."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil

ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "transformers", "numpy", "pyzmq", "msgspec")
CPU_TICKS_S = os.sysconf("SC_CLK_TCK")


def facts() -> dict[str, Any]:
    """CPU, cores, memory, kernel, versions of what computes."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in info if line.startswith("flags")).split()
    return {
        "cpu": next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name")),
        "cores": len(os.sched_getaffinity(0)), "isa": [flag for flag in ISA if flag in flags],
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1), "kernel": platform.release(),
        "python": platform.python_version(), "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def describe() -> str:
    """The same in one line."""
    found = facts()
    return (f"{found['cpu']}, {found['cores']} cores, {' '.join(found['isa'])}, {found['memory_gb']} GB,"
            f" Python {found['python']}, torch {found['versions']['torch']}")


def pressure() -> float:
    """Percent of the last 10 s in which something waited for a CPU."""
    return float(Path("/proc/pressure/cpu").read_text().split("avg10=")[1].split()[0])


def tree_cpu_s(pid: int) -> float:
    """CPU time so far of a process and everything it started, dead children included once they are waited for."""
    total_s = 0.0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


def machine_cpu_s() -> float:
    """CPU time so far of the whole machine, without idling and waiting for the disk."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / CPU_TICKS_S


class Watch:
    """Over a whole run: CPU pressure before and after, and what processes that are not ours used.

    ``end`` it while the engines still run: the time of a killed process that nobody waited for is lost.
    """

    def __init__(self) -> None:
        self._pressure_before = pressure()
        self._started_s, self._machine_s, self._own_s = time.monotonic(), machine_cpu_s(), tree_cpu_s(os.getpid())
        self._result: dict[str, float] | None = None

    def end(self) -> None:
        self._result = self._until_now()

    def result(self) -> dict[str, float]:
        return self._result or self._until_now()

    def _until_now(self) -> dict[str, float]:
        elapsed_s = time.monotonic() - self._started_s
        others_s = machine_cpu_s() - self._machine_s - (tree_cpu_s(os.getpid()) - self._own_s)
        return {"pressure_before": self._pressure_before, "pressure_after": pressure(), "seconds": round(elapsed_s, 1),
                "others_cores": round(max(0.0, others_s) / max(elapsed_s, 0.01), 2)}
