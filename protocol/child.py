"""What the three child processes have in common at their start.

launch.py starts ``python -P -m <package>.process --run-dir D --lifeline-fd N --epoch E
--gen G --rank R``; each child's ``main`` calls ``start_child`` first.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from protocol.config import EngineConfig
from protocol.lifeline import Lifeline
from protocol.progress import ProgressPage, State
from protocol.run_dir import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChildContext:
    """What launch.py told this process."""

    role: str
    rank: int
    epoch: int           # incarnation of the core (of the frontend for a frontend)
    gen: int             # incarnation of the worker
    run_dir: RunDir
    config: EngineConfig
    lifeline: Lifeline
    page: ProgressPage

    @property
    def routing_id(self) -> bytes:
        return routing_id(self.role, self.rank, self.epoch, self.gen)

    def failed(self, error: Exception) -> int:
        """The exit code.  What is wrong with settings, files or memory launch.py says to the user;
        only a bug of ours gets a traceback too."""
        loading = self.page.get("state") == State.LOADING
        expected = loading and isinstance(error, (ValueError, OSError, MemoryError))
        text = str(error) or type(error).__name__
        logger.log(logging.INFO if expected else logging.ERROR, "%s", text, exc_info=None if expected else error)
        self.page.set_text("error", text)
        self.page.set("state", State.FAILED)
        return 1


def routing_id(role: str, rank: int, epoch: int, gen: int) -> bytes:
    """``w0.g7``, ``f1.e3``: a replacement never has the id of the peer it replaces."""
    return (f"w{rank}.g{gen}" if role == "worker" else f"{role[0]}{rank}.e{epoch}").encode()


def start_child(role: str) -> ChildContext:
    """Read the arguments, ignore SIGINT, open the progress page, set up the log."""
    parser = argparse.ArgumentParser(prog=f"folovllm-{role}")
    parser.add_argument("--run-dir", required=True)
    for name in ("--lifeline-fd", "--rank", "--epoch", "--gen"):
        parser.add_argument(name, type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_dir = RunDir(Path(arguments.run_dir))
    config = run_dir.read_config()
    set_up_log(role, config.run.log_level)
    set_process_name(f"folovllm: {role} {arguments.rank}")
    try:
        page = ProgressPage.create(run_dir.page(role, arguments.rank), role, arguments.rank,
                                   arguments.epoch, arguments.gen)
    except OSError as error:      # a full disk; there is no page to say it on
        sys.exit(f"folovllm: {role}: {error.filename}: {error.strerror}")
    return ChildContext(role, arguments.rank, arguments.epoch, arguments.gen, run_dir, config,
                        Lifeline(arguments.lifeline_fd), page)


def set_up_log(role: str, level: str) -> None:
    logging.basicConfig(stream=sys.stderr, level=level.upper(),
                        format=f"%(asctime)s {role} %(levelname)s %(message)s", datefmt="%H:%M:%S")


def set_process_name(name: str) -> None:
    """What ``ps`` shows: argv overwritten in place (a changed executable would lose the
    virtual environment), and the thread name."""
    libc = ctypes.CDLL(None)
    libc.prctl(15, name.replace("folovllm: ", "folo-")[:15].encode(), 0, 0, 0)  # PR_SET_NAME
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        arg_start, arg_end = int(fields[45]), int(fields[46])
    except (OSError, ValueError, IndexError):
        return
    room = arg_end - arg_start
    if arg_start and room > 1:
        text = name.encode()[:room - 1]
        ctypes.memmove(arg_start, text.ljust(room, b"\0"), room)
