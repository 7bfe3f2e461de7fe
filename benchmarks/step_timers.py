"""Timers put around a model's products and attention, and names for compiled kernels in a trace.

Used by ``step_worker.py`` alone.  Classes are patched while a ``StepTimers`` is entered: the
product that calls another product (the head) is counted once, as the outer one.  A forward
that is one call into the kernels shows none of them: there they are replayed after it.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu_worker.attention.interface import AttentionMetadata
from gpu_worker.kernels.library import Library
from gpu_worker.kv_cache import KVCache


class StepTimers:
    """Seconds in the layers' products, in the head and in attention; a context manager."""

    def __init__(self, model: Any) -> None:
        self._head = model.head()
        self._product_types = {type(product) for product in (*model.linears(), self._head)}
        self._attention_type = type(model.attention)
        self._seconds = {"products": 0.0, "head": 0.0, "attention": 0.0}
        self._undo: list[tuple[type, str, Callable]] = []
        self._inside = False

    def per_step_ms(self, steps: int) -> dict[str, float]:
        return {part: 1e3 * seconds / steps for part, seconds in self._seconds.items()}

    def __enter__(self) -> StepTimers:
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


class LastForward:
    """Keeps what the model's last forward was given, while entered."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.metadata: AttentionMetadata | None = None
        self.kv: KVCache | None = None

    def __enter__(self) -> LastForward:
        forward = self._model.forward

        def kept(token_ids: Any, positions: Any, metadata: AttentionMetadata, kv: KVCache) -> Any:
            self.metadata, self.kv = metadata, kv
            return forward(token_ids, positions, metadata, kv)

        self._model.forward = kept
        return self

    def __exit__(self, *_: object) -> None:
        del self._model.forward      # the class's again


@torch.inference_mode()
def replayed_ms(model: Any, last: LastForward, times: int) -> dict[str, float]:
    """Products of all layers, and attention of all layers, one after another on random rows.

    Overwrites the K/V of the last step.
    """
    tokens, spec = last.metadata.num_tokens, model.spec
    products = model.linears()
    rows = {kind: torch.randn(tokens, kind[0]).to(kind[1]) for kind in {(p.in_features, p.input_dtype) for p in products}}
    query, key, value = (torch.randn(tokens, heads, spec.head_dim).to(spec.dtype)
                         for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads))

    def multiply() -> None:
        for product in products:
            product(rows[product.in_features, product.input_dtype])

    def attend() -> None:
        step = model.attention.begin(last.metadata, last.kv)
        for layer in spec.layers:
            step.attend(layer, query, key, value)

    return {"products": _median_ms(multiply, times), "attention": _median_ms(attend, times)}


def _median_ms(run: Callable[[], None], times: int) -> float:
    run()
    seconds = []
    for _ in range(times):
        started_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started_s)
    return 1e3 * statistics.median(seconds)


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
