"""Matrix products by the compiled kernels: weights in panels, and the product itself.

Used by the models on a CPU.  An output's bits depend on its row and its weights only, not on
the number of rows or threads.  The arithmetic of each kind stands in ``linear.h``, and in plain
torch in ``linear_reference.py``.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gpu_worker.kernels import panels as packing
from gpu_worker.kernels.elementwise import QuantizedRows
from gpu_worker.kernels.huge_pages import GrowingHugePages, HugePages
from gpu_worker.kernels.library import Library

MAX_INPUTS = 32768           # MAX_WIDTH of rows.h


class WeightKind(enum.IntEnum):
    """What a weight is kept as; it decides the arithmetic, together with the form of the rows."""

    FLOAT32 = 0
    BF16 = 1
    INT8 = 2                 # a scale for each output
    INT8_BLOCKS = 3          # a float16 scale for each 32 inputs of an output: GGUF's Q8_0
    INT4_BLOCKS = 4          # a float16 scale and minimum likewise: GGUF's Q4_0, Q4_1


class InputKind(enum.IntEnum):
    """What rows are."""

    FLOAT32 = 0
    BF16 = 1
    PER_TOKEN = 2
    PER_GROUP = 3


ALLOWED_INPUTS = {
    WeightKind.FLOAT32: (InputKind.FLOAT32,), WeightKind.BF16: (InputKind.BF16,),
    WeightKind.INT8: (InputKind.PER_TOKEN, InputKind.PER_GROUP),
    WeightKind.INT8_BLOCKS: (InputKind.PER_GROUP,), WeightKind.INT4_BLOCKS: (InputKind.PER_GROUP,)}


INTEGERS = {WeightKind.INT8: (-127, 127), WeightKind.INT8_BLOCKS: (-128, 127), WeightKind.INT4_BLOCKS: (-8, 7)}     # least, largest


class LinearWeight(ctypes.Structure):
    """``struct LinearWeight`` of linear.h: addresses into a Weight's tensors, which must outlive it."""

    _fields_ = [("kind", ctypes.c_int32), ("n", ctypes.c_int32), ("k", ctypes.c_int32), ("k_block", ctypes.c_int32),
                ("panels", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class LinearInput(ctypes.Structure):
    """``struct LinearInput`` of linear.h."""

    _fields_ = [("kind", ctypes.c_int32), ("rows", ctypes.c_int32), ("values", ctypes.c_void_p), ("scales", ctypes.c_void_p),
                ("sums", ctypes.c_void_p)]


@dataclass(frozen=True)
class Weight:
    """[n, k], packed, perhaps with a bias."""

    kind: WeightKind
    n: int
    k: int
    k_block: int             # inputs summed from zero before they are added to the sum so far; FLOAT32 and BF16
    panels: Tensor           # uint8 [panels, bytes]
    scales: Tensor | None    # float32 [n padded], of INT8
    bias: Tensor | None      # float32 [n padded]

    @classmethod
    def from_float(cls, kind: WeightKind, weight: Tensor, bias: Tensor | None = None, k_block: int | None = None) -> Weight:
        """[n, k] of any float type, quantized to the nearest where ``kind`` says so."""
        weight = weight.to(torch.bfloat16 if kind == WeightKind.BF16 else torch.float32)
        scales = None
        if kind == WeightKind.INT8:
            values, scales = packing.quantize_int8(weight)
            packed = packing.pack_int8(values)
        elif kind == WeightKind.INT8_BLOCKS:
            packed = packing.pack_int8_blocks(*packing.quantize_int8_blocks(weight))
        elif kind == WeightKind.INT4_BLOCKS:
            packed = packing.pack_int4_blocks(*packing.quantize_int4_blocks(weight))
        else:
            packed = packing.pack_words(weight)
        return cls._made(kind, tuple(weight.shape), packed, scales, bias, k_block)

    @classmethod
    def from_gguf_blocks(cls, name: str, blocks: Tensor, bias: Tensor | None = None) -> Weight:
        """The blocks of a GGUF file as they stand: ``name`` Q4_0, Q4_1 or Q8_0, uint8 [n, bytes]."""
        shape = (len(blocks), blocks.shape[1] // packing.BLOCK_BYTES[name] * packing.GROUP)
        if name == "Q8_0":
            return cls._made(WeightKind.INT8_BLOCKS, shape, packing.pack_int8_blocks(*packing.read_gguf_int8(blocks)), None, bias)
        return cls._made(WeightKind.INT4_BLOCKS, shape, packing.pack_int4_blocks(*packing.read_gguf_int4(blocks, name)), None, bias)

    @classmethod
    def from_integers(cls, kind: WeightKind, values: Tensor) -> Weight:
        """int64 [n, k] within ``INTEGERS``, all scales 1 (4-bit values count from a minimum of −8)."""
        shape = n, k = tuple(values.shape)
        if kind == WeightKind.INT8:
            return cls._made(kind, shape, packing.pack_int8(values.to(torch.int8)), torch.ones(n), None)
        ones = torch.ones(n, k // packing.GROUP, dtype=torch.float16)
        if kind == WeightKind.INT8_BLOCKS:
            return cls._made(kind, shape, packing.pack_int8_blocks(values.to(torch.int8), ones), None, None)
        low, high = (values - INTEGERS[kind][0]).to(torch.uint8).view(n, -1, 2, packing.GROUP // 2).unbind(2)
        return cls._made(kind, shape, packing.pack_int4_blocks(low | high << 4, ones, ones * INTEGERS[kind][0]), None, None)

    @classmethod
    def _made(cls, kind: WeightKind, shape: tuple[int, ...], packed: Tensor, scales: Tensor | None, bias: Tensor | None,
              k_block: int | None = None) -> Weight:
        n, k = shape
        return cls(kind, n, k, k_block or k, packed, None if scales is None else packing.pad(scales),
                   None if bias is None else packing.pad(bias.float()))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Weight:
        """What ``tensors`` gave, without a copy: panels may lie in a mapped file, best on a multiple of 64 bytes.

        ValueError where they do not go together: the kernels believe every number.
        """
        for name in ("header", "panels"):
            if name not in tensors:
                raise ValueError(f"{name} is missing")
        _check("header", tensors["header"], torch.int64, (4,))
        kind, n, k, k_block = tensors["header"].tolist()
        return cls(WeightKind(kind), n, k, k_block, tensors["panels"], tensors.get("scales"), tensors.get("bias"))

    def __post_init__(self) -> None:
        if self.k % packing.GROUP or not 0 < self.k <= MAX_INPUTS:
            raise ValueError(f"inputs of a product: was {self.k}; allowed: a multiple of {packing.GROUP} up to {MAX_INPUTS}")
        if self.k_block % packing.GROUP or not 0 < self.k_block <= self.k:
            raise ValueError(f"k_block: was {self.k_block}; allowed: a multiple of {packing.GROUP} up to {self.k}")
        if self.n <= 0:
            raise ValueError(f"outputs of a product: was {self.n}; allowed: above 0")
        padded = -(-self.n // packing.PANEL) * packing.PANEL
        _check("panels", self.panels, torch.uint8, (padded // packing.PANEL, _panel_bytes(self.kind, self.k)))
        if (self.scales is None) == (self.kind == WeightKind.INT8):
            raise ValueError(f"scales: was {'nothing' if self.scales is None else 'a tensor'}; allowed: with INT8, and with nothing else")
        for name, each in (("scales", self.scales), ("bias", self.bias)):
            if each is not None:
                _check(name, each, torch.float32, (padded,))

    def tensors(self) -> dict[str, Tensor]:
        """To be written into a file of safetensors, under any prefix."""
        header = torch.tensor([self.kind, self.n, self.k, self.k_block], dtype=torch.int64)
        optional = {"scales": self.scales, "bias": self.bias}
        return {"header": header, "panels": self.panels, **{name: each for name, each in optional.items() if each is not None}}

    def moved(self, pages: HugePages | GrowingHugePages) -> Weight:
        """A copy in ``pages``."""
        panels, scales, bias = (None if each is None else pages.take(each) for each in (self.panels, self.scales, self.bias))
        return replace(self, panels=panels, scales=scales, bias=bias)

    @cached_property
    def structure(self) -> LinearWeight:
        """For the kernels; its addresses hold as long as this weight lives."""
        addresses = (None if each is None else each.data_ptr() for each in (self.panels, self.scales, self.bias))
        return LinearWeight(self.kind, self.n, self.k, self.k_block, *addresses)


def _panel_bytes(kind: WeightKind, k: int) -> int:
    """Of 16 outputs with ``k`` inputs, as ``panels.py`` packs them."""
    groups = k // packing.GROUP
    return {WeightKind.FLOAT32: 4 * packing.PANEL * k, WeightKind.BF16: 2 * packing.PANEL * k, WeightKind.INT8: packing.PANEL * k,
            WeightKind.INT8_BLOCKS: packing.int8_block_bytes(groups), WeightKind.INT4_BLOCKS: packing.int4_block_bytes(groups)}[kind]


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name}: was {described(tensor.dtype, tensor.shape)}; allowed: {described(dtype, shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: was not contiguous")


def described(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """E.g. "float32 [576]"."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


class Linear:
    """rows [any, k] → rows · weightᵀ + bias [any, n]."""

    def __init__(self, library: Library, weight: Weight, num_threads: int, dtype: torch.dtype) -> None:
        assert dtype in (torch.float32, torch.bfloat16), "float32 or bfloat16"
        self.weight, self._function, self._threads, self._dtype = weight, library.functions.folo_linear, num_threads, dtype

    def __call__(self, rows: Tensor | QuantizedRows) -> Tensor:
        given = linear_input(self.weight, rows)
        result = torch.empty(given.rows, self.weight.n, dtype=self._dtype)
        self._function(self._dtype == torch.bfloat16, ctypes.byref(self.weight.structure), ctypes.byref(given), result.data_ptr(),
                       self._threads)
        return result


def linear_input(weight: Weight, rows: Tensor | QuantizedRows) -> LinearInput:
    """Addresses of rows that ``weight`` can take; they must outlive the call."""
    values = rows.values if isinstance(rows, QuantizedRows) else rows
    assert values.is_contiguous() and values.dim() == 2 and values.shape[1] == weight.k, "contiguous rows of k inputs"
    kind = input_kind(rows)
    assert kind in ALLOWED_INPUTS[weight.kind], f"{weight.kind.name} does not take {kind.name} rows"
    if isinstance(rows, QuantizedRows):
        return LinearInput(kind, len(values), values.data_ptr(), rows.scales.data_ptr(), rows.sums.data_ptr())
    return LinearInput(kind, len(values), values.data_ptr(), None, None)


def input_kind(rows: Tensor | QuantizedRows) -> InputKind:
    if isinstance(rows, QuantizedRows):
        return InputKind.PER_TOKEN if rows.scales.dim() == 1 else InputKind.PER_GROUP
    return {torch.float32: InputKind.FLOAT32, torch.bfloat16: InputKind.BF16}[rows.dtype]
