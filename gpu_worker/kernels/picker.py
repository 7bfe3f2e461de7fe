"""Tokens from logits by the compiled kernels.

Used by the sampler on a CPU.  Greedy rows get what ``picking.TorchPicker`` gives them, bit for
bit.  Random rows are drawn by the same rules, without a sort; their weights are the kernels' own
e^x, and sums have an order of their own (``draw.h``): where a cumulative weight falls within a
rounding of its bound another token may be taken than torch takes, and the name says so.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from gpu_worker.kernels.library import Library
from gpu_worker.picking import Sampled
from protocol.steps import RowError

SEGMENT = 2048               # LOGITS_SEGMENT of greedy.h
SHARED_FROM = 2**18          # logits; of fewer, a second thread may come later than one needs for all
DRAW_DTYPE = np.dtype([("top_p", "f8"), ("noise", "f8"), ("temperature", "f4"), ("min_p", "f4"), ("top_k", "i4"), ("row", "i4")])  # draw.h


class KernelPicker:
    """A ``picking.Picker``; rows and segments of rows are shared among threads."""

    def __init__(self, library: Library, num_threads: int) -> None:
        self.name = f"cpu kernels {library.build}"
        self._functions, self._threads = library.functions, num_threads

    def largest(self, logits: Tensor, empty: RowError) -> Sampled:
        logits = _rows_of_floats(logits)
        rows, n = logits.shape
        scratch = torch.empty(rows, -(-n // SEGMENT))
        token_ids, errors = torch.empty(2, rows, dtype=torch.int64)
        self._functions.folo_greedy(logits.data_ptr(), rows, n, RowError.NAN_LOGITS, empty, scratch.data_ptr(), token_ids.data_ptr(),
                                    errors.data_ptr(), self._threads_for(rows * n))
        return Sampled(token_ids, errors)

    def random(self, logits: Tensor, which: np.ndarray, params: np.ndarray, noise: np.ndarray, empty: RowError) -> Sampled:
        logits = _rows_of_floats(logits)
        count, n = len(which), logits.shape[1]
        assert count and 0 <= which.min() and which.max() < len(logits), "rows of the logits"
        draws = np.empty(count, DRAW_DTYPE)
        for name in ("top_p", "temperature", "min_p", "top_k"):
            draws[name] = params[name]
        draws["noise"], draws["row"] = noise, which
        threads = self._threads_for(count * n)
        needed = ctypes.c_int64()
        self._functions.folo_draw_scratch_bytes(n, ctypes.byref(needed))
        scratch = torch.empty(threads * needed.value, dtype=torch.uint8)
        token_ids, errors = torch.empty(2, count, dtype=torch.int64)
        self._functions.folo_draw(logits.data_ptr(), draws.ctypes.data, count, n, RowError.NAN_LOGITS, empty, scratch.data_ptr(),
                                  token_ids.data_ptr(), errors.data_ptr(), threads)
        return Sampled(token_ids, errors)

    def _threads_for(self, num_logits: int) -> int:
        return self._threads if num_logits >= SHARED_FROM else 1


def _rows_of_floats(logits: Tensor) -> Tensor:
    """Contiguous."""
    assert logits.dtype == torch.float32 and logits.dim() == 2, "rows of float32"
    return logits.contiguous()
