"""The run directory: one engine's sockets, lock, settings and progress pages.

launch.py creates, locks and empties it; its children and clients only look things up.
Mode 0700.  A second engine on the same directory is refused by the lock *before* any
socket is bound: a second bind on a live ipc path would succeed and steal it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec

from protocol.cache_dir import cache_dir
from protocol.config import EngineConfig

MAX_SOCKET_PATH_BYTES = 107
DEFAULT_NAME = "default"


class RunDirError(RuntimeError):
    """The run directory cannot be used; the message says why and what to do."""


class RunDir:
    """Paths inside one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_file = path / "lock"
        self.config_file = path / "config.json"
        self.core_socket = path / "core.sock"        # core binds, frontends connect
        self.worker_socket = path / "worker.sock"    # core binds, workers connect
        self.client_socket = path / "client.sock"    # frontend binds, SDK clients connect

    def page(self, role: str, rank: int = 0) -> Path:
        """The progress page of one process."""
        return self.path / f"{role}{rank}.page"

    def write_config(self, config: EngineConfig) -> None:
        temporary = self.config_file.with_suffix(".tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(config))
            temporary.replace(self.config_file)
        except OSError as error:
            raise RunDirError(f"run_dir: cannot write {self.config_file}: {error.strerror}") from None

    def read_config(self) -> EngineConfig:
        return msgspec.json.decode(self.config_file.read_bytes(), type=EngineConfig)

    def create_and_lock(self) -> "RunDirLock":
        """Make the directory, take its lock and clear what a dead engine left behind."""
        longest = max(len(os.fsencode(p)) for p in (self.core_socket, self.worker_socket, self.client_socket))
        if longest > MAX_SOCKET_PATH_BYTES:
            raise RunDirError(f"run_dir: {self.path} makes socket paths of {longest} bytes;"
                              f" at most {MAX_SOCKET_PATH_BYTES} are allowed: choose a shorter one")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"run_dir: cannot create {self.path}: {error.strerror}") from None
        info = self.path.stat()
        if info.st_uid != os.getuid():
            raise RunDirError(f"run_dir: {self.path} belongs to user {info.st_uid}; it must be your own")
        if info.st_mode & 0o077:
            raise RunDirError(f"run_dir: {self.path} has mode {info.st_mode & 0o777:o}; it must be 700")
        lock = RunDirLock(self)
        self.clear()
        return lock

    def clear(self) -> None:
        """Remove sockets, pages and settings; the lock file is the lock's."""
        for entry in self.path.iterdir():
            if entry.suffix in (".sock", ".page", ".json", ".tmp"):
                entry.unlink(missing_ok=True)


class RunDirLock:
    """An flock on the directory's lock file; goes with the process that holds it."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        try:
            self._fd = os.open(run_dir.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RunDirError(f"run_dir: cannot write {run_dir.lock_file}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(self._fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise RunDirError(f"run_dir: {run_dir.path} is in use by the engine with pid {owner};"
                              " choose another with --run-dir") from None
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, str(os.getpid()).encode(), 0)
        except OSError as error:
            self.release()
            raise RunDirError(f"run_dir: cannot write {run_dir.lock_file}: {error.strerror}") from None

    def release(self) -> None:
        """Leave no file behind: sockets, pages, settings, lock; the directory too if it is empty."""
        self.run_dir.clear()
        self.run_dir.lock_file.unlink(missing_ok=True)
        os.close(self._fd)
        try:
            self.run_dir.path.rmdir()
        except OSError:
            pass  # the user keeps something else in it


def locate(run_dir: str | None = None) -> RunDir:
    """``run_dir``, else $FOLOVLLM_RUN_DIR, else the default one of this user."""
    chosen = run_dir or os.environ.get("FOLOVLLM_RUN_DIR")
    if chosen:
        return RunDir(Path(chosen).expanduser().absolute())
    return RunDir(default_parent() / DEFAULT_NAME)


def default_parent() -> Path:
    """Where run directories without a name of their own go."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "folovllm"
    return cache_dir() / "run"
