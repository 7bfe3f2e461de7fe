"""The kernel library at each level that can run here: the CPU's own, those below it, and the
512-bit code through SIMDe where its headers are installed."""

import shutil
from pathlib import Path

import pytest

from gpu_worker.kernels.build import LEVELS, Level, cpu_flags
from gpu_worker.kernels.library import Library

EMULATION = Path(__file__).with_name("emulated_avx512.h")
EMULATED = Level("emulated_avx512", LEVELS[-1].needs, (*LEVELS[-1].options, "-include", str(EMULATION)))


def levels():
    found = [level for level in LEVELS if level.needs <= cpu_flags()]
    if Path("/usr/include/simde").is_dir() and LEVELS[-1] in found and LEVELS[0] not in found:
        found.append(EMULATED)
    return found


@pytest.fixture(scope="session", params=levels(), ids=lambda level: level.name)
def library(request):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return Library.open(request.param)
