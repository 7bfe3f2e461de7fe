"""The threads of a call, through the kernels: what each touches, whoever was called before or calls meanwhile."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from gpu_worker.kernels.linear import Linear, Weight, WeightKind
from gpu_worker.kernels.picker import DRAW_DTYPE

ROWS, VOCAB = 48, 256


def product(n):
    return Weight.from_float(WeightKind.FLOAT32, torch.randn(n, 576, generator=torch.Generator().manual_seed(n)))


def draw(library, logits, scratch, threads):
    draws = np.zeros(ROWS, DRAW_DTYPE)
    draws["row"], draws["temperature"], draws["top_p"] = np.arange(ROWS), 1.0, 1.0
    token_ids, errors = torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS, dtype=torch.int64)
    library.functions.folo_draw(logits.data_ptr(), draws.ctypes.data, ROWS, VOCAB, 1, 2, scratch.data_ptr(), token_ids.data_ptr(),
                                errors.data_ptr(), threads)


def test_a_small_team_after_a_large_one(library):
    """A helper of a team of 8 takes nothing of a team of 2, where it would have no scratch."""
    needed = ctypes.c_int64()
    library.functions.folo_draw_scratch_bytes(VOCAB, ctypes.byref(needed))
    logits = torch.randn(ROWS, VOCAB)
    of_eight, of_two = (torch.full((8, needed.value), 77, dtype=torch.uint8) for _ in range(2))
    for _ in range(100 if "emulated" in library.level else 500):
        draw(library, logits, of_eight, 8)
        draw(library, logits, of_two, 2)
    assert (of_two[2:] == 77).all()


def test_two_callers_at_once(library):
    """The helpers are one caller's; another one computes alone meanwhile."""
    products, rows = [product(n) for n in (960, 576)], torch.randn(9, 576)
    expected = [Linear(library, each, 1, torch.float32)(rows) for each in products]

    def often(i):
        linear = Linear(library, products[i % 2], 3, torch.float32)
        return all(torch.equal(linear(rows), expected[i % 2]) for _ in range(50))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(often, range(6)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")      # of Python: a fork of a process that has threads
def test_a_fork_has_no_helpers_and_computes_alone(library):
    linear, rows = Linear(library, product(960), 2, torch.float32), torch.randn(9, 576)
    expected = linear(rows)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear(rows), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
