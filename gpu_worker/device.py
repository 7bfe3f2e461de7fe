"""Where the worker computes and how much of the machine it takes.

Called once, by ``startup.py``: the device, the threads, the blocks of KV memory.  The
differences between CPU and CUDA that are not a kernel live here.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from gpu_worker import cgroup
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.spec import ModelSpec
from protocol.codec import BLOCK_SIZE_TOKENS
from protocol.config import SchedulerConfig

logger = logging.getLogger(__name__)
CPU_INFO = Path("/proc/cpuinfo")
KERNEL_SETTINGS = ("ONEDNN_", "DNNL_", "MKL_")    # environment variables of the matrix libraries
KV_SHARE = 0.4          # of the available memory, where the user gives no number


class DeviceError(ValueError):
    """The machine lacks what was asked for; the message names the setting."""


@dataclass(frozen=True, slots=True)
class KVSize:
    """How much the KV cache holds, and how long a request may therefore be."""

    num_blocks: int
    max_model_len: int      # tokens


def choose_device(asked: str) -> torch.device:
    """``auto``: CUDA where there is a device, else the CPU."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = "this torch build has no CUDA" if torch.version.cuda is None else "no CUDA device was found"
        raise DeviceError(f"device: was {asked!r}, but {reason}; allowed: 'auto' or 'cpu'")
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: torch.device) -> str:
    """``cpu``, or the accelerator's own name."""
    return "cpu" if device.type == "cpu" else f"{device.type} ({torch.cuda.get_device_name(device)})"


def arithmetic(device: torch.device) -> list[str]:
    """What the libraries of a device choose their kernels by."""
    if device.type != "cpu":
        return [device_name(device)]
    lines = CPU_INFO.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    processor = [line for line in lines if line.startswith(("model name", "flags"))]
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(KERNEL_SETTINGS)]
    return [torch.backends.cpu.get_cpu_capability(), *processor, *settings]


def choose_threads(asked: int | None) -> int:
    """Threads of the CPU's operators: what was asked, else what affinity and cgroup leave."""
    if asked is not None:
        return asked
    allowed = len(os.sched_getaffinity(0))
    quota = cgroup.cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def available_bytes(device: torch.device) -> int:
    """Memory that could be taken now."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    left = cgroup.memory_left_bytes()
    return free if left is None else min(free, left)


def size_kv(spec: ModelSpec, scheduler: SchedulerConfig, asked_max_model_len: int | None, free_bytes: int) -> KVSize:
    """Blocks as given (number or bytes), else for max_num_seqs whole requests, at most 40 % of ``free_bytes``.

    Where they do not hold one request of the model's length, that length is lowered.
    """
    max_model_len = spec.max_model_len if asked_max_model_len is None else asked_max_model_len
    block_bytes = KVCache.block_bytes(spec, spec.kv_dtype)
    num_blocks = _num_blocks(scheduler, block_bytes, max_model_len, free_bytes)
    if num_blocks * BLOCK_SIZE_TOKENS < max_model_len:
        logger.warning("max_model_len is lowered from %d to %d tokens: the KV cache has %d blocks of %d tokens",
                       max_model_len, num_blocks * BLOCK_SIZE_TOKENS, num_blocks, BLOCK_SIZE_TOKENS)
        max_model_len = num_blocks * BLOCK_SIZE_TOKENS
    return KVSize(num_blocks, max_model_len)


def _num_blocks(scheduler: SchedulerConfig, block_bytes: int, max_model_len: int, free_bytes: int) -> int:
    if scheduler.num_kv_blocks is not None:
        if scheduler.kv_cache_memory_bytes is not None:
            raise DeviceError(f"num_kv_blocks: was {scheduler.num_kv_blocks} beside kv_cache_memory_bytes ="
                              f" {scheduler.kv_cache_memory_bytes}; allowed: one of the two")
        wanted = scheduler.num_kv_blocks
        if wanted * block_bytes > free_bytes:
            raise DeviceError(f"num_kv_blocks: was {wanted}, which takes {wanted * block_bytes} bytes;"
                              f" allowed: at most {free_bytes // block_bytes}, for {free_bytes} bytes are free")
        return wanted
    if scheduler.kv_cache_memory_bytes is not None:
        given = scheduler.kv_cache_memory_bytes
        if not block_bytes <= given <= free_bytes:
            raise DeviceError(f"kv_cache_memory_bytes: was {given}; allowed: at least {block_bytes} (one block),"
                              f" at most {free_bytes} (what is free)")
        return given // block_bytes
    wanted = scheduler.max_num_seqs * -(-max_model_len // BLOCK_SIZE_TOKENS)
    affordable = int(free_bytes * KV_SHARE) // block_bytes
    if affordable < 1:
        raise DeviceError(f"kv_cache_memory_bytes: one KV block takes {block_bytes} bytes, and {KV_SHARE:.0%} of the"
                          f" {free_bytes} bytes that are free do not hold it")
    return min(wanted, affordable)
