"""The most likely token of each row of logits by the compiled kernels.

Used by the models on a CPU for plain greedy rows; gives what ``sampler.py`` gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.kernels.library import Library
from protocol.steps import RowError

SEGMENT = 2048               # LOGITS_SEGMENT of greedy.h


class Greedy:
    """logits → (token ids, errors): the lowest id of equal ones; NaN and an infinite largest logit are errors."""

    def __init__(self, library: Library, num_threads: int) -> None:
        self._function, self._threads = library.functions.folo_greedy, num_threads

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [rows, vocab_size] → int64 [rows], and int64 [rows] RowError, 0: none."""
        assert logits.dtype == torch.float32 and logits.dim() == 2 and logits.is_contiguous(), "contiguous rows of float32"
        rows, n = logits.shape
        scratch = torch.empty(rows, -(-n // SEGMENT))
        token_ids, errors = torch.empty(2, rows, dtype=torch.int64)
        self._function(logits.data_ptr(), rows, n, RowError.NAN_LOGITS, scratch.data_ptr(), token_ids.data_ptr(), errors.data_ptr(),
                       self._threads)
        return token_ids, errors
