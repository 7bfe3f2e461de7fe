"""Tokens from logits by the compiled kernels.

Used by the sampler on a CPU.  Greedy rows get what ``picking.TorchPicker`` gives them, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gpu_worker.kernels.library import Library
from gpu_worker.picking import Sampled, TorchPicker
from protocol.steps import RowError

SEGMENT = 2048               # LOGITS_SEGMENT of greedy.h


class KernelPicker:
    """A ``picking.Picker``."""

    def __init__(self, library: Library, num_threads: int) -> None:
        self.name = TorchPicker.name
        self._greedy, self._torch, self._threads = library.functions.folo_greedy, TorchPicker(), num_threads

    def largest(self, logits: Tensor, empty: RowError) -> Sampled:
        assert logits.dtype == torch.float32 and logits.dim() == 2, "rows of float32"
        logits = logits.contiguous()
        rows, n = logits.shape
        scratch = torch.empty(rows, -(-n // SEGMENT))
        token_ids, errors = torch.empty(2, rows, dtype=torch.int64)
        self._greedy(logits.data_ptr(), rows, n, RowError.NAN_LOGITS, empty, scratch.data_ptr(), token_ids.data_ptr(), errors.data_ptr(),
                     self._threads)
        return Sampled(token_ids, errors)

    def random(self, logits: Tensor, which: np.ndarray, params: np.ndarray, noise: np.ndarray, empty: RowError) -> Sampled:
        return self._torch.random(logits, which, params, noise, empty)
