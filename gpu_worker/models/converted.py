"""Where converted checkpoints stand: made once, under a lock, beside their place, then renamed.

Used by the short-lived children that fetch and convert models.  Imports nothing heavy: a
start that finds everything in place must cost nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Callable

from gpu_worker.models import manifest
from protocol.cache_dir import cache_dir, flush, taken
from protocol.parent_death import die_with_parent

logger = logging.getLogger(__name__)


class ConversionError(RuntimeError):
    """The model cannot be fetched or converted; the message is for the user."""


GGUF_NAME = "model.gguf"      # the file that a checkpoint was converted from, kept beside it


def models_dir() -> Path:
    return cache_dir() / "models"


def converted(source: Path, version: str, convert: Callable[[Path, Path], None]) -> Path:
    """The checkpoint made of the file ``source``, keyed by its content and ``version``."""
    name = f"{source.stem}-{content_hash(source)[:16]}-{version}"
    return make_once(name, lambda target: convert(source, target))


def make_once(name: str, make: Callable[[Path], None], *, checked: bool = False) -> Path:
    """The directory ``name`` among the models; ``make`` fills a new one that then takes its place.

    ``checked``: all its bytes are compared with what was written, each time; it is made anew where they differ.
    """
    place = models_dir() / name
    if place.is_dir() and not (checked and manifest.damage(place)):
        return place
    models_dir().mkdir(parents=True, exist_ok=True, mode=0o700)
    with taken(models_dir() / ".lock", "makes a model ready"):
        if place.is_dir():
            damage = manifest.damage(place) if checked else None
            if damage is None:
                return place
            logger.warning("%s: %s; made anew", place, damage)
            place.rename(tempfile.mkdtemp(prefix=".making-", dir=models_dir()))
        for left_over in models_dir().glob(".making-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        beside = Path(tempfile.mkdtemp(prefix=".making-", dir=models_dir()))
        try:
            make(beside)
            if checked:
                manifest.write(beside)
            for path in (*beside.iterdir(), beside):
                flush(path)
            beside.rename(place)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return place


def content_hash(path: Path) -> str:
    """sha256 of a file; remembered by its identity, since models are large."""
    stat = path.stat()
    identity = json.dumps([str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns])
    memo = cache_dir() / "fingerprints" / hashlib.sha256(identity.encode()).hexdigest()
    with contextlib.suppress(OSError):
        return memo.read_text(encoding="ascii")
    digest = sha256(path)
    with contextlib.suppress(OSError):     # then it is computed again next time
        memo.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = memo.with_name(f"{memo.name}.{os.getpid()}.tmp")
        temporary.write_text(digest, encoding="ascii")
        temporary.replace(memo)
    return digest


def sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def report(what: str, resolve: Callable[[], Path]) -> int:
    """The main program of such a child.  Prints the directory, or the reason why there is none; the exit code tells which."""
    die_with_parent()
    try:
        print(resolve())
    except (ConversionError, OSError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{error.strerror or error}: {error.filename or cache_dir()}"
        print(f"{what}: {reason}")
        return 1
    return 0
