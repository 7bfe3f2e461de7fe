"""Timers put around a model's products and attention, and names for compiled kernels in a trace.

Used by ``step_worker.py`` alone.  Classes are patched while a ``StepTimers`` is entered: the
product that calls another product (the head) is counted once, as the outer one.  A forward
that is one call into the kernels shows none of them: there the kernels themselves look at the clock.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu_worker.kernels.decoder import DecoderTimes
from gpu_worker.kernels.library import Library
from gpu_worker.models.kernel_decoder import KernelDecoder


class StepTimers:
    """Seconds in the layers' products, in the head and in attention; a context manager."""

    def __init__(self, model: Any) -> None:
        self._one_call = model.call if isinstance(model, KernelDecoder) else None
        self._head = model.head()
        self._product_types = {type(product) for product in (*model.linears(), self._head)}
        self._attention_type = type(model.attention)
        self._seconds = {"products": 0.0, "head": 0.0, "attention": 0.0}
        self._undo: list[tuple[type, str, Callable]] = []
        self._inside = False

    def per_step_ms(self, steps: int) -> dict[str, float]:
        return {part: 1e3 * seconds / steps for part, seconds in self._seconds.items()}

    def __enter__(self) -> StepTimers:
        if self._one_call is not None:
            self._one_call.times = DecoderTimes()
        for kind in self._product_types:
            self._patch(kind, "__call__", lambda owner: "head" if owner is self._head else "products")
        begin, patched = self._attention_type.begin, set()

        def begin_and_patch(*arguments: Any, **options: Any) -> Any:
            step = begin(*arguments, **options)
            if type(step) not in patched:
                patched.add(type(step))
                self._patch(type(step), "attend", lambda _: "attention")
            return step

        self._undo.append((self._attention_type, "begin", begin))
        self._attention_type.begin = begin_and_patch
        return self

    def __exit__(self, *_: object) -> None:
        for kind, name, original in reversed(self._undo):
            setattr(kind, name, original)
        self._undo.clear()
        if self._one_call is not None:
            times, self._one_call.times = self._one_call.times, None
            self._seconds["products"] += times.products / 1e9
            self._seconds["attention"] += times.attention / 1e9

    def _patch(self, kind: type, name: str, part_of: Callable[[Any], str]) -> None:
        original = getattr(kind, name)
        self._undo.append((kind, name, original))

        def timed(owner: Any, *arguments: Any, **options: Any) -> Any:
            if self._inside:
                return original(owner, *arguments, **options)
            self._inside, started_s = True, time.perf_counter()
            try:
                return original(owner, *arguments, **options)
            finally:
                self._seconds[part_of(owner)] += time.perf_counter() - started_s
                self._inside = False

        setattr(kind, name, timed)


class KernelRecorder:
    """Stands for the library of compiled kernels; while ``on``, each call is an event of torch's profiler."""

    on = False

    def __init__(self) -> None:
        self._functions: Any = None

    @classmethod
    def install(cls) -> KernelRecorder:
        """From now on libraries are opened with the recorder before their functions."""
        recorder, open_library = cls(), Library.open

        def opened(*arguments: Any, **options: Any) -> Library:
            library = open_library(*arguments, **options)
            recorder._functions = library.functions
            return dataclasses.replace(library, functions=recorder)

        Library.open = opened
        return recorder

    def __getattr__(self, name: str) -> Callable:
        function = getattr(self._functions, name)

        def called(*arguments: Any) -> Any:
            if not self.on:
                return function(*arguments)
            with torch.profiler.record_function(name):
                return function(*arguments)

        setattr(self, name, called)      # the next look-up finds it at once
        return called
