"""A child process that stays loaded and answers JSON lines: the parent's side of ``peers/json_lines.py``.

Used for the peers, for vLLM's scheduler and for our own step profile.  Between two questions
its whole process group is stopped: some peers spin while they have nothing to do, and only one
engine may work at a time.  Its stderr goes to a log file; when it dies, the reason is made from
its signal or from the end of that log.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

LEAVE_S = 10.0               # after its stdin has ended
LOG_TAIL_BYTES = 20_000


class ChildFailed(RuntimeError):
    """The child cannot do it, or is gone; the message is one line for the report."""


class Child:
    """One process; ``ask`` it one thing at a time."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                                             start_new_session=True)
        self._buffer = b""
        self._hangs = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, op: str, timeout_s: float, **fields: Any) -> Any:
        """The answer; raises ChildFailed."""
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildFailed(self._why()) from None
        answer = json.loads(self._line(time.monotonic() + timeout_s, op))
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)    # it may have run on for a moment
        if isinstance(answer, dict) and "error" in answer:
            raise ChildFailed(one_line(answer["error"]))
        return answer

    def close(self) -> None:
        """End it with everything it started."""
        if self._process.stdin.closed:
            return
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass                     # it died before it read all
        try:
            self._process.wait(0 if self._hangs else LEAVE_S)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        """To its group; it has a session of its own, so nothing of ours is in it."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass

    def _line(self, deadline_s: float, op: str) -> bytes:
        while b"\n" not in self._buffer:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                self._hangs = True
                raise ChildFailed(f"gave no answer to '{op}' in time")
            chunk = os.read(self._process.stdout.fileno(), 1 << 20)
            if not chunk:
                raise ChildFailed(self._why())
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _why(self) -> str:
        code = self._process.wait()
        return death_reason(code, self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace"))


def death_reason(code: int, log: str) -> str:
    """One line from an exit code and the end of a log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if code == -signal.SIGILL:
        return "was killed by SIGILL: it is built for instructions that this CPU lacks"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    errors = [line for line in lines if "Error" in line]
    return one_line(f"ended with code {code}: {(errors or lines or ['it said nothing'])[-1]}")


def one_line(text: str) -> str:
    """Short enough for a report."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."
