"""Compiles the kernels for the instructions that this CPU has: once, into the cache directory.

Called by ``library.py`` at start.  The file name is a hash over sources, flags and compiler, so
a library that is found is the right one; it is written beside its place and renamed.  Behind the
library, where no loader looks, stands its sha256: half a library would end the process that opens
it, by a signal, so one that is not what was written is compiled anew.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from protocol.cache_dir import cache_dir, flush, taken

SOURCES = Path(__file__).resolve().parent
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-stack-clash-protection", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden")
LONGEST, LONGEST_FLAGS = "attention.cpp", ("-O2",)       # half of all there is to compile; a sixth sooner so, and as fast
COMPILERS = ("g++", "c++", "clang++")
TIMEOUT_S = 120.0
BUILDING = ".building-"
DIGEST_BYTES = 32


class KernelsUnavailable(RuntimeError):
    """There are no kernels here; the message says why."""


@dataclass(frozen=True, slots=True)
class Level:
    """A set of instructions that the kernels are written for."""

    name: str
    needs: frozenset[str]          # flags of /proc/cpuinfo
    options: tuple[str, ...]       # of the compiler


_AVX2 = Level("avx2", frozenset(("avx2", "fma", "f16c")), ("-mavx2", "-mfma", "-mf16c"))
_AVX512 = Level("avx512", _AVX2.needs | {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
                (*_AVX2.options, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"))
_VNNI = Level("avx512_vnni", _AVX512.needs | {"avx512_vnni"}, (*_AVX512.options, "-mavx512vnni"))
_BF16 = Level("avx512_bf16", _VNNI.needs | {"avx512_bf16"}, (*_VNNI.options, "-mavx512bf16"))
LEVELS = (_BF16, _VNNI, _AVX512, _AVX2)      # best first


def best_level(cpu_flags: frozenset[str]) -> Level:
    """The first level that the CPU has in full; KernelsUnavailable below AVX2."""
    for level in LEVELS:
        if level.needs <= cpu_flags:
            return level
    raise KernelsUnavailable(f"this CPU lacks {', '.join(sorted(_AVX2.needs - cpu_flags))}")


def cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo says of the first processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def build(level: Level, extra: tuple[str, ...] = ()) -> Path:
    """The shared library for ``level``, compiled if it is not in the cache; KernelsUnavailable names what failed."""
    compiler = _compiler()
    flags = (*COMMON_FLAGS, *level.options, *extra)
    place = cache_dir() / "kernels" / f"{level.name}-{_key(compiler, flags)}.so"
    try:
        if not _is_whole(place):
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with taken(place.parent / ".lock", "compiles the kernels"):
                if not _is_whole(place):
                    _make(compiler, flags, place)
    except OSError as error:
        raise KernelsUnavailable(f"{place.parent}: {error.strerror or error}") from None
    return place


def _is_whole(place: Path) -> bool:
    """Whether the library is there, and is what was written: about 1 ms."""
    try:
        content = place.read_bytes()
    except FileNotFoundError:
        return False
    return content[-DIGEST_BYTES:] == hashlib.sha256(content[:-DIGEST_BYTES]).digest()


def _make(compiler: str, flags: tuple[str, ...], place: Path) -> None:
    """Compiles the library beside its place; on the disk before it has its name."""
    for left_over in place.parent.glob(f"{BUILDING}*"):      # of a process that was killed: no other one has the lock
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=BUILDING, dir=place.parent) as folder:
        library = _compile(compiler, flags, Path(folder))
        with library.open("r+b") as opened:
            digest = hashlib.file_digest(opened, "sha256").digest()
            opened.write(digest)
        flush(library)
        library.replace(place)
    flush(place.parent)


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else COMPILERS:
        if found := shutil.which(name):
            return found
    if asked:
        raise KernelsUnavailable(f"CXX: was {asked!r}; allowed: the name or the path of a C++ compiler")
    raise KernelsUnavailable(f"no C++ compiler was found ({', '.join(COMPILERS)}, or CXX in the environment)")


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(_run([compiler, "--version"]).stdout)
    digest.update("\0".join((*flags, LONGEST, *LONGEST_FLAGS)).encode())
    for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _compile(compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
    """Two units side by side, then one link.  The intrinsics alone take a second to read, as often as there are units: so there
    are no more, the one that takes longest and all others together."""
    sources = sorted(path for path in SOURCES.glob("*.cpp") if path.name != LONGEST)
    others = folder / "others.cpp"
    others.write_text("".join(f'#include "{source}"\n' for source in sources), encoding="utf-8")
    units = [(SOURCES / LONGEST, LONGEST_FLAGS), (others, ())]
    objects = [folder / f"{unit.stem}.o" for unit, _ in units]

    def compiled(unit: tuple[Path, tuple[str, ...]], target: Path) -> subprocess.CompletedProcess[bytes]:
        return _run([compiler, *flags, *unit[1], "-c", str(unit[0]), "-o", str(target)])

    with ThreadPoolExecutor(len(units)) as pool:
        for done in pool.map(compiled, units, objects):
            if done.returncode:
                raise KernelsUnavailable(f"the kernels do not compile with {compiler}: {_first_error(done.stderr)}")
    library = folder / "kernels.so"
    linked = _run([compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)])
    if linked.returncode:
        raise KernelsUnavailable(f"the kernels do not link with {compiler}: {_first_error(linked.stderr)}")
    return library


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise KernelsUnavailable(f"{command[0]} was not done after {TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise KernelsUnavailable(f"{command[0]}: {error.strerror}") from None


def _first_error(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "it gave no reason").strip()
