"""A decoder's whole forward as one call into the kernels.

Used by ``models/kernel_decoder.py``.  The structures mirror those of ``decoder.h``; only addresses
cross, so whoever fills a structure keeps its tensors alive.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from gpu_worker.kernels.attention import KVLayer, Plan
from gpu_worker.kernels.library import Library
from gpu_worker.kernels.linear import LinearWeight

ALIGNMENT = 64                # bytes


class Product(ctypes.Structure):
    """A weight, and what it wants its rows as (``elementwise.Output``)."""

    _fields_ = [("weight", LinearWeight), ("input", c_int32)]


class DecoderLayer(ctypes.Structure):
    """One layer's weights, and which of a step's attention plans it uses."""

    _fields_ = [("qkv", Product), ("output", Product), ("gate_up", Product), ("down", Product), ("input_norm", c_void_p),
                ("mlp_norm", c_void_p), ("query_norm", c_void_p), ("key_norm", c_void_p), ("plan", c_int32)]


class DecoderModel(ctypes.Structure):
    """All weights but the head's, and the shapes."""

    _fields_ = [("layers", ctypes.POINTER(DecoderLayer)), ("embedding", c_void_p), ("norm", c_void_p), ("cosines", c_void_p),
                ("sines", c_void_p), ("num_layers", c_int32), ("hidden", c_int32), ("intermediate", c_int32), ("num_heads", c_int32),
                ("num_kv_heads", c_int32), ("head_dim", c_int32), ("eps", c_float), ("scale", c_float), ("embedding_is_bf16", c_int32),
                ("is_bf16", c_int32)]


class DecoderTimes(ctypes.Structure):
    """Nanoseconds in the parts of a forward, added to what stands here."""

    _fields_ = [("products", c_int64), ("attention", c_int64), ("rest", c_int64)]


class DecoderStep(ctypes.Structure):
    """One step's tokens."""

    _fields_ = [("kv", ctypes.POINTER(KVLayer)), ("plans", ctypes.POINTER(c_void_p)), ("token_ids", c_void_p), ("positions", c_void_p),
                ("slots", c_void_p), ("normed", c_void_p), ("scratch", c_void_p), ("times", ctypes.POINTER(DecoderTimes)), ("tokens", c_int32),
                ("threads", c_int32)]


class DecoderCall:
    """The call, on a scratch that grows to the largest step met."""

    def __init__(self, library: Library, model: DecoderModel, num_threads: int) -> None:
        self._functions, self._model, self._threads = library.functions, model, num_threads
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.times: DecoderTimes | None = None       # for whoever wants to know where the time goes

    def __call__(self, token_ids: Tensor, positions: Tensor, slots: Tensor, kv: ctypes.Array, plans: list[Plan], normed: Tensor) -> None:
        """int64 [tokens] three times; ``kv`` one KVLayer a layer; fills ``normed`` [tokens, hidden]."""
        tokens = len(token_ids)
        assert all(x.dtype == torch.int64 and len(x) == tokens and x.is_contiguous() for x in (token_ids, positions, slots))
        addresses = (c_void_p * len(plans))(*(plan.address for plan in plans))
        times = None if self.times is None else ctypes.pointer(self.times)
        step = DecoderStep(ctypes.cast(kv, ctypes.POINTER(KVLayer)), addresses, token_ids.data_ptr(), positions.data_ptr(),
                           slots.data_ptr(), normed.data_ptr(), self._scratch_for(tokens), times, tokens, self._threads)
        self._functions.folo_decode(ctypes.byref(self._model), ctypes.byref(step))

    def _scratch_for(self, tokens: int) -> int:
        needed = c_int64()
        self._functions.folo_decoder_scratch_bytes(ctypes.byref(self._model), tokens, ctypes.byref(needed))
        if self._scratch.numel() < needed.value + ALIGNMENT:
            self._scratch = torch.empty(needed.value + ALIGNMENT, dtype=torch.uint8)
        return -(-self._scratch.data_ptr() // ALIGNMENT) * ALIGNMENT
