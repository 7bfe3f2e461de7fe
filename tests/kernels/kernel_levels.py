"""The levels of the kernels that can run here: the CPU's own, those below it, and the 512-bit code
through SIMDe where the CPU lacks it and SIMDe's headers are installed."""

import hashlib
import shutil
from pathlib import Path

import pytest

from gpu_worker.kernels.build import LEVELS, Level, cpu_flags
from gpu_worker.kernels.library import Library

SIMDE = Path("/usr/include/simde")
EMULATION = Path(__file__).with_name("emulated_avx512.h")
EMULATED_OPTIONS = (*LEVELS[-1].options, "-include", str(EMULATION),
                    f"-DEMULATION={int(hashlib.sha256(EMULATION.read_bytes()).hexdigest()[:8], 16)}")     # else an old library is found
EMULATED = Level("emulated_avx512", LEVELS[-1].needs, EMULATED_OPTIONS)
EMULATED_BASE = Level("emulated_avx512_base", LEVELS[-1].needs, (*EMULATED_OPTIONS, "-DEMULATED_BASE"))     # without VNNI and BF16


def levels(flags=None, simde=SIMDE):
    """Best first, the emulated ones last."""
    flags = cpu_flags() if flags is None else flags
    found = [level for level in LEVELS if level.needs <= flags]
    if found and LEVELS[0] not in found and simde.is_dir():
        found += [EMULATED, EMULATED_BASE]
    return found


def opened(level):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return Library.open(level)
