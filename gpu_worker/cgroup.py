"""What the container around this process allows: processors and memory, cgroup v2 and v1.

Read by ``device.py`` at start.  Every level from the process's own group up to the root may
set a limit; the tightest counts.  None where nothing limits, or nothing can be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED_BYTES = 1 << 60          # v1 writes a number near 2**63 where it means "no limit"


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Processors' worth of time a second, e.g. 1.5."""
    quotas = []
    for group in _groups(root, membership, ""):
        words = _read(group / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
    for group in _groups(root, membership, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_left_bytes(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes until the limit; file pages that the system drops at need count as free."""
    left = []
    for group in _groups(root, membership, ""):
        left.append(_left(group, "memory.max", "memory.current", "inactive_file"))
    for group in _groups(root, membership, "memory"):
        left.append(_left(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    return min((value for value in left if value is not None), default=None)


def _left(group: Path, limit_name: str, usage_name: str, droppable_name: str) -> int | None:
    limit, usage = _number(group / limit_name), _number(group / usage_name)
    if limit is None or usage is None or limit >= UNLIMITED_BYTES:
        return None
    lines = (line.split() for line in _read(group / "memory.stat").splitlines())
    droppable = next((int(words[1]) for words in lines if len(words) == 2 and words[0] == droppable_name), 0)
    return max(0, limit - usage + min(droppable, usage))


def _groups(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Directories from the process's group up to the root; controller "" is version 2."""
    for line in _read(membership).splitlines():
        _number_of, controllers, path = line.split(":", 2)
        if (controller in controllers.split(",")) if controller else controllers == "":
            for top in ([root / controller] if controller else [root, root / "unified"]):
                group = top / path.lstrip("/")
                yield from (parent for parent in (group, *group.parents) if parent.is_relative_to(top))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    if text in ("", "max"):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if math.isfinite(value) else None
