"""Norm, activation and quantization of rows by the compiled kernels.

Used by the models on a CPU.  Rows are float32 or bfloat16, contiguous, their width a multiple
of 32; quantized rows are int8 with one float32 scale a row, or one for each group of 32, and the
sums of the values beside them (products of unsigned weights want those).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.kernels.library import Library

GROUP = 32                   # inputs that share a scale


class Output(enum.IntEnum):
    """What an operator hands on."""

    ROWS = 0
    PER_TOKEN = 1
    PER_GROUP = 2


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """values · scale, of the row or of the group."""

    values: Tensor           # int8 [rows, width], in [-127, 127]
    scales: Tensor           # float32 [rows] or [rows, width // 32]
    sums: Tensor             # int32, likewise: of the values


class Elementwise:
    """The operators, on a number of threads."""

    def __init__(self, library: Library, num_threads: int) -> None:
        self._functions, self._threads = library.functions, num_threads

    def add_norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float,
                 output: Output = Output.ROWS) -> Tensor | QuantizedRows:
        """hidden [rows, width] += added, in place; its RMS norm times weight [width]."""
        rows, width = hidden.shape
        result = _result(hidden, width, output)
        self._functions.folo_add_norm(
            _is_bf16(hidden), hidden.data_ptr(), None if added is None else _like(added, hidden).data_ptr(),
            _like(weight, hidden).data_ptr(), eps, rows, width, output, *_addresses(result), self._threads)
        return result

    def silu_multiply(self, gate_up: Tensor, output: Output = Output.ROWS) -> Tensor | QuantizedRows:
        """[rows, 2 · n], gate then up → silu(gate) · up [rows, n]."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        result = _result(gate_up, width, output)
        self._functions.folo_silu_multiply(_is_bf16(gate_up), gate_up.data_ptr(), rows, width, output, *_addresses(result), self._threads)
        return result

    def quantize(self, x: Tensor, output: Output) -> QuantizedRows:
        """Rows as they stand."""
        rows, width = x.shape
        result = _result(x, width, output)
        _, *addresses = _addresses(result)
        self._functions.folo_quantize_rows(_is_bf16(x), x.data_ptr(), rows, width, output, *addresses, self._threads)
        return result


def _result(x: Tensor, width: int, output: Output) -> Tensor | QuantizedRows:
    assert x.is_contiguous() and width % GROUP == 0, "contiguous rows of whole groups"
    rows = x.shape[0]
    if output is Output.ROWS:
        return x.new_empty(rows, width)
    parts = (rows,) if output is Output.PER_TOKEN else (rows, width // GROUP)
    return QuantizedRows(torch.empty(rows, width, dtype=torch.int8), torch.empty(parts), torch.empty(parts, dtype=torch.int32))


def _addresses(result: Tensor | QuantizedRows) -> tuple[int | None, int | None, int | None, int | None]:
    if isinstance(result, QuantizedRows):
        return None, result.values.data_ptr(), result.scales.data_ptr(), result.sums.data_ptr()
    return result.data_ptr(), None, None, None


def _like(x: Tensor, other: Tensor) -> Tensor:
    assert x.dtype == other.dtype and x.is_contiguous() and x.shape[-1] == other.shape[-1], "operands of one kind"
    return x


def _is_bf16(x: Tensor) -> bool:
    assert x.dtype in (torch.float32, torch.bfloat16), "float32 or bfloat16"
    return x.dtype == torch.bfloat16
