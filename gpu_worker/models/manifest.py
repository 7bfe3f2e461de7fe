"""What the files of a directory were when they were written: their sizes and CRC-32 sums, in a file beside them.

Written by ``converted.py`` before a directory takes its place, compared at every start after that: weights
that are not what was written would be served as if they were.  A CRC finds every accident (a bit, a block of
zeros, half a file) for about half a CPU second a gigabyte; it finds no malice, and need not: who can write
here can write the sums as well.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

NAME = "manifest.json"
CHUNK_BYTES = 1 << 17          # stays in a core's own cache: with 1 MiB a start took up to twice the time
MAX_THREADS = 16


def write(folder: Path) -> None:
    """For all files that are there now, the largest first: the threads then end together."""
    paths = sorted((path for path in folder.iterdir() if path.name != NAME), key=lambda path: -path.stat().st_size)
    entries = dict(zip([path.name for path in paths], _sums(paths), strict=True))
    (folder / NAME).write_text(json.dumps(entries, indent=1), encoding="ascii")


def damage(folder: Path) -> str | None:
    """The first file that is not what was written, and why; None: all are."""
    try:
        entries: dict[str, list[int]] = json.loads((folder / NAME).read_text(encoding="ascii"))
        expected = {folder / name: (size, crc) for name, (size, crc) in entries.items()}
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (ValueError, TypeError, AttributeError):
        return f"{NAME} is damaged"
    for path, (size, _) in expected.items():
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes, of {size} that were written"
    for path, found in zip(expected, _sums(list(expected)), strict=True):
        if found != expected[path]:
            return f"{path.name} is damaged: its bytes are not those that were written"
    return None


def _sums(paths: list[Path]) -> list[tuple[int, int]]:
    """Bytes and CRC-32 of each file; zlib leaves other threads the interpreter."""
    from concurrent.futures import ThreadPoolExecutor    # starts that check nothing need not wait for it

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MAX_THREADS)) as pool:
        return list(pool.map(_sum, paths))


def _sum(path: Path) -> tuple[int, int]:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    size = crc = 0
    with path.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            size, crc = size + count, zlib.crc32(buffer[:count], crc)
    return size, crc
