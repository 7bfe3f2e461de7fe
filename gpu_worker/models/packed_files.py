"""A decoder's weights as the kernels read them, on disk: put into that order once, and copied straight into huge pages.

Filled by ``packed_parts.py`` (a checkpoint as it is) and ``quantization/modes.py``, read by
``packed_parts.py``.  Files and names are those of ``quantization/tensor_files.py``; but of a
product ``name`` there are the tensors of its ``kernels.linear.Weight``: ``name.header``,
``name.panels``, and ``name.scales`` and ``name.bias`` where it has them.  The order of panels is the
same for every set of instructions.  It is named in the directory's name, so that another one is
made anew, and in each file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpu_worker.kernels import panels
from gpu_worker.kernels.huge_pages import HugePages, whole_lines
from gpu_worker.kernels.linear import Weight, WeightKind
from gpu_worker.models.decoder_config import DecoderConfig
from gpu_worker.models.decoder_parts import PROJECTIONS, read_layer, read_top
from gpu_worker.models.kept_weights import save
from gpu_worker.models.spec import ModelError
from gpu_worker.models.weights import Checkpoint
from gpu_worker.quantization.blocks import Block4Weight, Block8Weight
from gpu_worker.quantization.products import Weight as QuantizedWeight
from gpu_worker.quantization.tensor_files import TOP, layer_name, linear_from, norm_tensors, path, top_tensors

LAYOUT_KEY = "layout"
IN_HUGE_PAGES = ("panels", "scales", "bias")          # of a product: what every token reads
DTYPES = {"U8": torch.uint8, "F32": torch.float32}
CPU = torch.device("cpu")


def checkpoint_tensors(checkpoint: Checkpoint, config: DecoderConfig) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(file, its tensors) of a checkpoint in bfloat16."""
    top = read_top(checkpoint, config, torch.bfloat16, CPU)
    yield TOP, top_tensors(top) | _tensors("head", Weight.from_float(WeightKind.BF16, top.head))
    for index in range(config.num_layers):
        layer = read_layer(checkpoint, config, index, torch.bfloat16, CPU)
        found = norm_tensors(layer)
        for name in PROJECTIONS:
            affine = getattr(layer, name)
            found |= _tensors(name, Weight.from_float(WeightKind.BF16, affine.weight, affine.bias))
        yield layer_name(index), found


def packed_tensors(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's quantized tensors, as ``tensor_files`` names them, with products in the kernels' order."""
    found = {key: tensor for key, tensor in tensors.items() if "." not in key}
    for product in ("head",) if name == TOP else PROJECTIONS:
        found |= _tensors(product, _packed(*linear_from(product, tensors)))
    return found


def _packed(weight: QuantizedWeight, bias: Tensor | None) -> Weight:
    n, k = weight.shape
    scales = None
    if isinstance(weight, Block4Weight):
        kind, packed = WeightKind.INT4_BLOCKS, panels.pack_int4_blocks(weight.nibbles, weight.scales, weight.minimums)
    elif isinstance(weight, Block8Weight):
        kind, packed = WeightKind.INT8_BLOCKS, panels.pack_int8_blocks(weight.values, weight.scales)
    else:
        kind, packed, scales = WeightKind.INT8, panels.pack_int8(weight.values), panels.pad(weight.scales)
    return Weight(kind, n, k, k, packed, scales, None if bias is None else panels.pad(bias.float()))


def _tensors(name: str, weight: Weight) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in weight.tensors().items()}


def write(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    save(tensors, path(folder, name), {LAYOUT_KEY: panels.LAYOUT})


class PackedFiles:
    """The files of a directory, opened at once: one run of memory holds what every token reads."""

    def __init__(self, folder: Path, num_layers: int) -> None:
        names = (TOP, *map(layer_name, range(num_layers)))
        self._files = {name: _File(path(folder, name)) for name in names}
        self._pages = HugePages(sum(whole_lines(count) for file in self._files.values() for count in file.sizes()))

    def read(self, name: str) -> dict[str, Tensor]:
        """A file's tensors; norms and the embedding are mapped."""
        return self._files[name].read(self._pages)

    def unreadable(self, name: str, why: str) -> ModelError:
        """What is said of a file that another part of the loader cannot use."""
        return self._files[name].unreadable(why)


class _File:
    def __init__(self, place: Path) -> None:
        self._place = place
        try:
            self._mapped = safe_open(place, framework="pt")
        except (OSError, SafetensorError) as error:
            raise self.unreadable(str(error)) from None
        layout = (self._mapped.metadata() or {}).get(LAYOUT_KEY)
        if layout != panels.LAYOUT:
            raise self.unreadable(f"its layout is {layout}, not {panels.LAYOUT}")
        with place.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            self._entries: dict[str, Any] = json.loads(opened.read(length))
        self._entries.pop("__metadata__")
        self._start = 8 + length

    def unreadable(self, why: str) -> ModelError:
        return ModelError(f"{self._place}: {why}; when {self._place.parent} is removed, it is made anew")

    def sizes(self) -> list[int]:
        """Bytes of each tensor that goes into huge pages."""
        return [self._end(name) - self._begin(name) for name in self._entries if _in_huge_pages(name)]

    def read(self, pages: HugePages) -> dict[str, Tensor]:
        with self._place.open("rb", buffering=0) as opened:
            return {name: self._copied(name, opened.fileno(), pages) if _in_huge_pages(name) else self._mapped.get_tensor(name)
                    for name in self._entries}

    def _copied(self, name: str, descriptor: int, pages: HugePages) -> Tensor:
        room = pages.room(self._end(name) - self._begin(name))
        left, position = memoryview(room.numpy()), self._start + self._begin(name)
        while left:
            count = os.preadv(descriptor, [left], position)
            if count == 0:
                raise self.unreadable("it ends too early")
            left, position = left[count:], position + count
        entry = self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise self.unreadable(f"{name}: its type is {entry['dtype']}; allowed: {', '.join(DTYPES)}")
        return room.view(DTYPES[entry["dtype"]]).view(entry["shape"])

    def _begin(self, name: str) -> int:
        return self._entries[name]["data_offsets"][0]

    def _end(self, name: str) -> int:
        return self._entries[name]["data_offsets"][1]


def _in_huge_pages(name: str) -> bool:
    return name.rpartition(".")[0] != "" and name.rpartition(".")[2] in IN_HUGE_PAGES
