"""The compiled kernels as Python functions on torch tensors' memory.

Opened once by the worker at start.  A signature stands here once for each function of the C ABI;
the collaborators that own a kernel (``elementwise.py`` and its neighbours) call them with
addresses, and check shapes and types first: nothing is checked on the other side.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from gpu_worker.kernels.build import KernelsUnavailable, Level, best_level, build, cpu_flags

_ADDRESS, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
SIGNATURES: dict[str, tuple[type, ...]] = {
    # is_bf16, hidden, added, weight, eps, rows, width, output, normed, values, scales, sums, threads
    "folo_add_norm": (_INT, _ADDRESS, _ADDRESS, _ADDRESS, _FLOAT, _INT, _INT, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _INT),
    # is_bf16, gate_up, rows, width, output, activated, values, scales, sums, threads
    "folo_silu_multiply": (_INT, _ADDRESS, _INT, _INT, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _INT),
    # is_bf16, x, rows, width, output, values, scales, sums, threads
    "folo_quantize_rows": (_INT, _ADDRESS, _INT, _INT, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _INT),
    # plan (out)
    "folo_plan_new": (_ADDRESS,),
    # plan
    "folo_plan_free": (_ADDRESS,),
    # plan, batch, shape, threads, ok (out)
    "folo_plan_make": (_ADDRESS, _ADDRESS, _ADDRESS, _INT, _ADDRESS),
    # FoloAttend
    "folo_attend": (_ADDRESS,),
    # FoloRopeStore
    "folo_rope_and_store": (_ADDRESS,),
    # is_bf16, weight, input, y, threads
    "folo_linear": (_INT, _ADDRESS, _ADDRESS, _ADDRESS, _INT),
    # logits, rows, n, nan_error, empty_error, scratch, token_ids, errors, threads
    "folo_greedy": (_ADDRESS, _INT, _INT, _INT, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _INT),
    # logits, draws, count, n, nan_error, empty_error, scratch, token_ids, errors, threads
    "folo_draw": (_ADDRESS, _ADDRESS, _INT, _INT, _INT, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _INT),
    # n, bytes (out)
    "folo_draw_scratch_bytes": (_INT, _ADDRESS),
    # model, tokens, bytes (out)
    "folo_decoder_scratch_bytes": (_ADDRESS, _INT, _ADDRESS),
    # model, step
    "folo_decode": (_ADDRESS, _ADDRESS),
}


@dataclass(frozen=True, slots=True)
class Library:
    """The functions, and what they were compiled for."""

    level: str                 # e.g. "avx512_bf16"
    build: str                 # the level, and a hash of sources, flags and compiler
    functions: ctypes.CDLL

    @classmethod
    def open(cls, level: Level | None = None, extra: tuple[str, ...] = ()) -> Library:
        """Compiled now if need be; KernelsUnavailable says why there is none."""
        level = level or best_level(cpu_flags())
        path = build(level, extra)
        try:
            functions = ctypes.CDLL(str(path))
        except OSError as error:        # a file system that nothing is run from, a C++ library that is missing
            raise KernelsUnavailable(str(error)) from None
        for name, arguments in SIGNATURES.items():
            function = getattr(functions, name)
            function.argtypes, function.restype = arguments, None
        return cls(level.name, path.stem, functions)
