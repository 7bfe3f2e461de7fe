"""Where this user's cached files stand: converted models, compiled kernels, fingerprints.

Used by every process and by the children that fetch models; imports nothing that takes time.
What takes long to make there is made under a lock (``taken``), and is on the disk (``flush``)
before it gets its final name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """$FOLOVLLM_CACHE_DIR, else $XDG_CACHE_HOME/folovllm, else ~/.cache/folovllm."""
    chosen = os.environ.get("FOLOVLLM_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "folovllm"


@contextlib.contextmanager
def taken(lock: Path, maker: str) -> Iterator[None]:
    """One process at a time; who has to wait says for whom.  A process that is killed has left the lock."""
    with open(lock, "w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"folovllm: waiting for another process that {maker} ...", file=sys.stderr, flush=True)
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def flush(path: Path) -> None:
    """A file or a directory to the disk: a power failure must not leave half a file under a final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
