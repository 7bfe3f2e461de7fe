"""The kernel library at each level that can run here: the CPU's own, those below it, and the
512-bit code through SIMDe where its headers are installed."""

import hashlib
import shutil
from pathlib import Path

import pytest

from gpu_worker.kernels.build import LEVELS, Level, cpu_flags
from gpu_worker.kernels.library import Library

EMULATION = Path(__file__).with_name("emulated_avx512.h")
EMULATED_OPTIONS = (*LEVELS[-1].options, "-include", str(EMULATION),
                    f"-DEMULATION={int(hashlib.sha256(EMULATION.read_bytes()).hexdigest()[:8], 16)}")     # else an old library is found
EMULATED = Level("emulated_avx512", LEVELS[-1].needs, EMULATED_OPTIONS)
EMULATED_BASE = Level("emulated_avx512_base", LEVELS[-1].needs, (*EMULATED_OPTIONS, "-DEMULATED_BASE"))     # without VNNI and BF16


def levels():
    found = [level for level in LEVELS if level.needs <= cpu_flags()]
    if Path("/usr/include/simde").is_dir() and LEVELS[-1] in found and LEVELS[0] not in found:
        found += [EMULATED, EMULATED_BASE]
    return found


@pytest.fixture(scope="session", params=levels(), ids=lambda level: level.name)
def library(request):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return Library.open(request.param)
