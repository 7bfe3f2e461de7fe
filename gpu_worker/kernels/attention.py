"""Paged attention by the compiled kernels: plans, the cache as they see it, and the calls.

Used by ``attention/cpu.py``.  The structures mirror those of ``attention_plan.h``, ``kv.h`` and
``attention_abi.cpp``; only addresses cross, so whoever fills a structure keeps its tensors alive.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from gpu_worker.kernels.library import Library
from gpu_worker.kv_cache import LayerKV

KV_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = (torch.float32, torch.bfloat16)
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 16, 512


class KVLayer(ctypes.Structure):
    """K and V of one layer."""

    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("key_scales", c_void_p), ("value_scales", c_void_p),
                ("type", c_int32), ("num_kv_heads", c_int32), ("head_dim", c_int32)]

    @classmethod
    def of(cls, kv: LayerKV) -> KVLayer:
        return cls(kv.key.data_ptr(), kv.value.data_ptr(), _address(kv.key_scale), _address(kv.value_scale),
                   KV_TYPES[kv.key.dtype], kv.key.shape[1], kv.key.shape[3])


class Batch(ctypes.Structure):
    """``AttentionBatch``: one step's rows."""

    _fields_ = [("rows", c_int32), ("query_start", c_void_p), ("seq_lens", c_void_p), ("block_table", c_void_p), ("table_stride", c_int64)]


class Shape(ctypes.Structure):
    """``AttentionShape``: what layers of one kind have in common."""

    _fields_ = [("num_heads", c_int32), ("num_kv_heads", c_int32), ("head_dim", c_int32), ("window", c_int32)]


class Heads(ctypes.Structure):
    """[tokens, heads, head_dim] with the last dimension contiguous."""

    _fields_ = [("x", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64)]

    @classmethod
    def of(cls, x: Tensor) -> Heads:
        assert x.stride(2) == 1, "a head's values lie one after another"
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class AttendCall(ctypes.Structure):
    """``FoloAttend``."""

    _fields_ = [("plan", c_void_p), ("kv", KVLayer), ("queries", Heads), ("keys", Heads), ("values", Heads), ("slots", c_void_p),
                ("attended", c_void_p), ("scale", c_float), ("softcap", c_float), ("tokens", c_int32), ("padded_tokens", c_int32),
                ("is_bf16", c_int32), ("threads", c_int32)]


class RopeStoreCall(ctypes.Structure):
    """``FoloRopeStore``."""

    _fields_ = [("qkv", c_void_p), ("queries", c_void_p), ("query_norm", c_void_p), ("key_norm", c_void_p), ("cosines", c_void_p),
                ("sines", c_void_p), ("positions", c_void_p), ("slots", c_void_p), ("kv", KVLayer), ("eps", c_float),
                ("tokens", c_int32), ("num_heads", c_int32), ("is_bf16", c_int32), ("threads", c_int32)]


class Plan:
    """How one step's attention is cut up, and its scratch; made anew for each step on the same memory."""

    def __init__(self, library: Library) -> None:
        self._functions = library.functions
        handle = c_void_p()
        self._functions.folo_plan_new(ctypes.byref(handle))
        if not handle:
            raise MemoryError("no memory for the plan of attention")
        self.address: int = handle.value

    def make(self, batch: Batch, shape: Shape, threads: int) -> None:
        """For ``threads`` threads; what ``batch`` points to must live until the step's last layer."""
        ok = c_int32()
        self._functions.folo_plan_make(self.address, ctypes.byref(batch), ctypes.byref(shape), threads, ctypes.byref(ok))
        if not ok:
            raise MemoryError("no memory for the scratch of attention")

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._functions.folo_plan_free(self.address)


def rope_and_store(library: Library, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float, cosines: Tensor, sines: Tensor,
                   positions: Tensor, slots: Tensor, kv: KVLayer, threads: int) -> Tensor:
    """qkv [tokens, (num_heads + 2 · num_kv_heads) · head_dim] → queries [tokens, num_heads, head_dim]; K and V to the cache.

    ``norms``: weights [head_dim] of query and key; tables float32 [positions, head_dim / 2]; positions and
    slots int64 [tokens], negative slots for padding.
    """
    assert qkv.dtype in ACTIVATIONS and qkv.is_contiguous() and cosines.is_contiguous() and sines.is_contiguous()
    num_heads = qkv.shape[1] // kv.head_dim - 2 * kv.num_kv_heads
    queries = qkv.new_empty(qkv.shape[0], num_heads, kv.head_dim)
    query_norm, key_norm = norms or (None, None)
    library.functions.folo_rope_and_store(ctypes.byref(RopeStoreCall(
        qkv.data_ptr(), queries.data_ptr(), _address(query_norm), _address(key_norm), cosines.data_ptr(), sines.data_ptr(),
        positions.data_ptr(), slots.data_ptr(), kv, eps, qkv.shape[0], num_heads, qkv.dtype == torch.bfloat16, threads)))
    return queries


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
