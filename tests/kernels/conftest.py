"""The kernel library at each level that can run here."""

import pytest

from kernel_levels import levels, opened


@pytest.fixture(scope="session", params=levels(), ids=lambda level: level.name)
def library(request):
    return opened(request.param)
