"""From an engine's settings to a worker that can run plans.

Called once by ``process.py``, which imports this module (and with it torch) only after it has
set the environment.  Everything that can be wrong with the settings, the machine or the model
ends here as one exception whose message names it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_worker.device import arithmetic, available_bytes, choose_device, choose_threads, device_name, size_kv
from gpu_worker.kv_cache import KVCache
from gpu_worker.model_runner import ModelRunner
from gpu_worker.models.registry import load_model
from gpu_worker.models.spec import LoadedModel
from gpu_worker.request_states import RequestStates
from gpu_worker.row_buckets import RowBuckets
from gpu_worker.self_check import Verdict, self_check
from protocol.config import EngineConfig

logger = logging.getLogger(__name__)
NO_ROW_PADDING = "FOLOVLLM_DISABLE_ROW_PADDING"


@dataclass(frozen=True, slots=True)
class LoadedWorker:
    """A runner, and what the others are told of it."""

    runner: ModelRunner
    device: str
    dtype: str                 # or the weights' quantization
    num_threads: int
    num_blocks: int
    max_model_len: int         # tokens
    numerics_fingerprint: str
    bit_exact: bool


def load_worker(config: EngineConfig) -> LoadedWorker:
    """Device, threads, model, self-check, KV cache and tables, in this order."""
    started = time.perf_counter()
    device = choose_device(config.model.device)
    num_threads = choose_threads(config.model.num_threads)
    torch.set_num_threads(num_threads)
    quantization = None if config.model.quantization == "none" else config.model.quantization
    model = load_model(Path(config.model_dir), dtype=config.model.dtype, quantization=quantization, device=device,
                       kv_cache_dtype=config.model.kv_cache_dtype,
                       max_model_len=config.model.max_model_len, num_threads=num_threads)
    loaded = time.perf_counter()
    buckets = RowBuckets(enabled=model.pads_rows and os.environ.get(NO_ROW_PADDING) != "1")
    fingerprint = _fingerprint(model, device, num_threads, buckets)
    verdict = self_check(model, buckets, fingerprint, config.scheduler.max_num_seqs)
    checked = time.perf_counter()
    size = size_kv(model.spec, config.scheduler, config.model.max_model_len, available_bytes(device))
    kv = KVCache(model.spec, size.num_blocks, model.spec.kv_dtype, device)
    states = RequestStates(config.scheduler.max_num_seqs, size.max_model_len, model.spec.vocab_size, size.num_blocks, device)
    _log(verdict, model, device)      # not before all is well: a refusal is one sentence
    logger.info("model %.2f s, self-check %.2f s, memory %.2f s; KV cache %d blocks, %.0f MB; row tables %.1f MB", loaded - started,
                checked - loaded, time.perf_counter() - checked, size.num_blocks,
                size.num_blocks * KVCache.block_bytes(model.spec, model.spec.kv_dtype) / 1e6, states.table_bytes() / 1e6)
    return LoadedWorker(
        runner=ModelRunner(model, kv, states, buckets), device=device_name(device),
        dtype=model.spec.quantization or str(model.spec.dtype).removeprefix("torch."), num_threads=num_threads, num_blocks=size.num_blocks,
        max_model_len=size.max_model_len, numerics_fingerprint=_joined(fingerprint, str(verdict.bit_exact)),
        bit_exact=verdict.bit_exact)


def _log(verdict: Verdict, model: LoadedModel, device: torch.device) -> None:
    """What is slower than it could be; a broken promise is a warning, one that nobody gave a piece of information."""
    if model.slower_because is not None:
        logger.warning("without own CPU kernels this model runs several times slower: %s", model.slower_because)
    promised = model.spec.backend == "decoder" and device.type == "cpu"
    for reason in verdict.reasons:
        logger.log(logging.WARNING if promised else logging.INFO, "outputs may depend on what else is in the batch: %s", reason)


def _fingerprint(model: LoadedModel, device: torch.device, num_threads: int, buckets: RowBuckets) -> str:
    """Equal where equal requests give equal bits: everything that chooses an arithmetic."""
    spec = model.spec
    return _joined(model.weights_fingerprint, str(spec.dtype), str(spec.kv_dtype), str(spec.quantization), spec.backend,
                   model.attention.name, model.picker.name, *arithmetic(device), str(num_threads), torch.__version__, str(buckets.enabled))


def _joined(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
