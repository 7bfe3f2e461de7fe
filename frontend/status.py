"""Who runs at a run directory and how it stands, read from lock file and progress pages.

Used by ``folovllm status`` and by the SDK to notice a death.  Asks nobody: it answers when
the core hangs, and it never touches the lock itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from protocol.progress import ProgressPage, State
from protocol.run_dir import RunDir

ROLE_ORDER = ("launch", "core", "worker", "frontend")


def process_state(pid: int) -> str | None:
    """None while the process runs or sleeps, else "dead" (a zombie too) or "stopped"."""
    try:
        return state_of(Path(f"/proc/{pid}/stat").read_text())
    except OSError:
        return "dead"


def state_of(stat: str) -> str | None:
    """The same of the text of /proc/PID/stat; the name in it may hold anything."""
    letter = stat.rsplit(")", 1)[1].split()[0]
    if letter in "ZXx":
        return "dead"
    return "stopped" if letter in "Tt" else None


def launch_pid(run_dir: RunDir) -> int | None:
    """The pid in the lock file, if that process lives."""
    try:
        pid = int(run_dir.lock_file.read_text())
    except (OSError, ValueError):
        return None
    return None if process_state(pid) == "dead" else pid


def open_pages(run_dir: RunDir) -> list[ProgressPage]:
    """The progress pages there are, launch first."""
    pages = []
    for path in sorted(run_dir.path.glob("*.page")):
        try:
            pages.append(ProgressPage(path))
        except (OSError, ValueError):
            continue      # being written or removed right now
    known = [page for page in pages if page.get_text("role") in ROLE_ORDER]
    return sorted(known, key=lambda page: (ROLE_ORDER.index(page.get_text("role")), page.get("rank")))


def no_engine(run_dir: RunDir) -> str:
    """What to tell someone who looked for an engine here."""
    return (f"no engine runs at {run_dir.path}: start one with 'python launch.py --run-dir {run_dir.path}',"
            " or name another with --run-dir or FOLOVLLM_RUN_DIR")


def cause_of_death(run_dir: RunDir) -> str | None:
    """Why no answer will come any more; None while launch.py and all its processes live."""
    pages = open_pages(run_dir)
    for page in pages:
        if page.get("state") == State.FAILED:
            return f"the {page.get_text('role')} process failed: {page.get_text('error')}"
    for page in pages:
        if process_state(page.get("pid")) == "dead" and page.get_text("role") == "frontend":
            return f"the frontend process (pid {page.get('pid')}) has died"
    if launch_pid(run_dir) is None:
        return f"the engine at {run_dir.path} has ended"
    return None


def read_status(run_dir: RunDir) -> dict[str, Any] | None:
    """What ``folovllm status --json`` prints; None if no engine runs and none has left a trace."""
    launch = launch_pid(run_dir)
    pages = open_pages(run_dir)
    if launch is None and not pages:
        return None
    processes = [_process(page) for page in pages]
    if launch is not None and not any(p["role"] == "launch" for p in processes):
        processes.insert(0, {"role": "launch", "pid": launch, "rank": 0, "epoch": 0, "gen": 0,
                             "state": process_state(launch) or "ready"})
    by_role = {page.get_text("role"): page for page in reversed(pages)}     # rank 0 wins
    core, worker = by_role.get("core"), by_role.get("worker")
    return {
        "processes": processes,
        "requests": {name: core.get(name) if core else 0 for name in ("running", "waiting")},
        "kv": {"blocks": core.get("blocks") if core else 0, "used": core.get("used_blocks") if core else 0},
        "model": _model_name(run_dir),
        "device": worker.get_text("device") if worker else "",
    }


def _process(page: ProgressPage) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": page.get_text("role")}
    entry |= {name: page.get(name) for name in ("pid", "rank", "epoch", "gen")}
    entry["state"] = process_state(entry["pid"]) or State(page.get("state")).name.lower()
    return entry


def _model_name(run_dir: RunDir) -> str:
    try:
        return run_dir.read_config().model_name
    except (OSError, msgspec.MsgspecError):
        return ""
