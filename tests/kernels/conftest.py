"""The kernel library at each level that can run here."""

import shutil

import pytest

from gpu_worker.kernels.library import Library
from kernel_levels import levels


@pytest.fixture(scope="session", params=levels(), ids=lambda level: level.name)
def library(request):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return Library.open(request.param)
