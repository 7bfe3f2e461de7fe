"""A private engine: launch.py as a child of the user's program, with pipes to know of each other.

Owned by ``LLMEngine``.  Two pipes: the report pipe brings one line, ready or why not; the
death pipe has its only writing end here, so that the engine ends when this program does,
by whatever means.  A forked child of the user's program closes its copy of that end at
once, and can end nothing.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

from frontend.errors import EngineNotRunning
from protocol import config as settings
from protocol.config import EngineConfig
from protocol.run_dir import MAX_SOCKET_PATH_BYTES, RunDir, default_parent

ROOT = Path(__file__).resolve().parent.parent     # where launch.py and the packages are
STOP_TIMEOUT_S = 10.0
ROOM_BYTES = 24                                   # for a directory and a socket name below it


class EngineProcess:
    """Start, wait until ready, stop."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises EngineNotRunning with launch.py's own words if it does not get ready."""
        self._temporary = None if config.run.run_dir else _private_dir()
        self.run_dir = RunDir(Path(config.run.run_dir or self._temporary).expanduser().absolute())
        flags = settings.to_arguments(settings.from_values({"run_dir": str(self.run_dir.path)}, config))
        death_read, self._death_write = os.pipe()
        report_read, report_write = os.pipe()
        self._pid = os.getpid()
        _close_after_fork(self)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "launch", *flags, f"--death-pipe-fd={death_read}",
                 f"--parent-report-fd={report_write}"],
                env=_environment(), pass_fds=(death_read, report_write), close_fds=True,
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        finally:
            os.close(death_read)
            os.close(report_write)
        try:
            self.facts = self._await_report(report_read)
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(report_read)

    def stop(self) -> None:
        """End the engine and wait for it; nothing in a forked child."""
        if os.getpid() != self._pid or self._death_write is None:
            return
        os.close(self._death_write)
        self._death_write = None
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()      # its children follow: their lifelines end
            self._process.wait()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _await_report(self, report_read: int) -> dict:
        """launch.py's one line.  Waits as long as it lives: a first start fetches the model."""
        text = b""
        while not text.endswith(b"\n"):
            select.select([report_read], [], [])
            chunk = os.read(report_read, 65536)
            if not chunk:
                code = self._process.wait()
                raise EngineNotRunning(f"the engine ended with code {code} before it was ready;"
                                       " what it said, if anything, is above, on stderr")
            text += chunk
        report = json.loads(text)
        if "error" in report:
            raise EngineNotRunning(f"the engine could not start: {report['error']}")
        return report


def _private_dir() -> str:
    """A fresh directory, mode 0700, with a path short enough for sockets."""
    parent = default_parent()
    if len(os.fsencode(parent)) + ROOM_BYTES > MAX_SOCKET_PATH_BYTES:
        parent = Path(tempfile.gettempdir())
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix="e-", dir=parent)


def _environment() -> dict[str, str]:
    """Ours first on the path; settings travel as flags, so their environment twins stay behind."""
    twins = {f"FOLOVLLM_{name.upper()}" for name in settings.fields()}
    env = {name: value for name, value in os.environ.items() if name not in twins}
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), env.get("PYTHONPATH")) if p)
    return env


def _close_after_fork(process: EngineProcess) -> None:
    """A forked child must not keep the engine alive by holding the death pipe open."""
    reference = weakref.ref(process)

    def close_copy() -> None:
        engine = reference()
        if engine is not None and engine._death_write is not None:
            os.close(engine._death_write)
            engine._death_write = None

    os.register_at_fork(after_in_child=close_copy)
