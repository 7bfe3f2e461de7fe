"""Which levels the other tests of this folder run on: what is left out is said."""

from pathlib import Path

import pytest

from gpu_worker.kernels.build import LEVELS, cpu_flags
from kernel_levels import EMULATED, EMULATED_BASE, SIMDE, levels

AVX2, BF16 = LEVELS[-1].needs, LEVELS[0].needs
HERE, NOWHERE = Path("/"), Path("/nowhere")


@pytest.mark.parametrize(("flags", "simde", "expected"), [
    (AVX2, HERE, [LEVELS[-1], EMULATED, EMULATED_BASE]), (AVX2, NOWHERE, [LEVELS[-1]]), (BF16, HERE, list(LEVELS)), (frozenset(), HERE, [])])
def test_levels_of_other_machines(flags, simde, expected):
    assert levels(flags, simde) == expected


def test_the_512_bit_code_is_tested_here():
    if not AVX2 <= cpu_flags():
        pytest.skip("this CPU lacks AVX2: no kernel is tested here")
    if not BF16 <= cpu_flags() and not SIMDE.is_dir():
        pytest.skip(f"this CPU lacks AVX512_BF16, and there is no {SIMDE} (Debian: libsimde-dev): no 512-bit kernel is tested here")
    assert LEVELS[0] in levels() or EMULATED in levels()
