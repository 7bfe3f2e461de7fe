"""From a model directory to a model that runs: which backend, which dtype, which attention.

Called by the worker at start.  The lean decoder takes what it knows in full; everything else
goes to the transformers backend, and the log says why.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_worker.attention.interface import AttentionBackend, AttentionLayer
from gpu_worker.attention.reference import ReferenceAttention
from gpu_worker.kernels.attention import KV_TYPES
from gpu_worker.models import decoder_config, weights
from gpu_worker.models.cpu_kernels import CpuKernels, attention_backend, picker_of
from gpu_worker.models.decoder import Decoder
from gpu_worker.models.decoder_parts import DecoderParts, PlainParts, TorchProducts
from gpu_worker.models.kernel_decoder import KernelDecoder
from gpu_worker.models.packed_parts import keeps_packed, packed_checkpoint
from gpu_worker.models.spec import LoadedModel, ModelError, ModelSpec
from gpu_worker.product_dtype import onednn_multiplies
from gpu_worker.quantization.modes import check_supported
from gpu_worker.quantization.parts import QuantizedParts, packed_quantized

__all__ = ["LoadedModel", "ModelError", "ModelSpec", "load_model"]
logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def load_model(model_dir: Path, *, dtype: str, device: torch.device, quantization: str | None = None, kv_cache_dtype: str = "auto",
               max_model_len: int | None = None, num_threads: int | None = None) -> LoadedModel:
    """The model in ``model_dir``, ready to run; ModelError names what is wrong with it.

    ``max_model_len`` (tokens) bounds the tables of positions; it may not exceed the config's.
    ``num_threads`` sets torch's pool, which weights are packed with.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    config = weights.read_json(model_dir / "config.json", required=True)
    _check_config(config)
    settings: dict[str, Any] = {"eos_token_ids": weights.eos_token_ids(model_dir),
                                "kv_dtype": None if kv_cache_dtype == "auto" else DTYPES[kv_cache_dtype]}
    try:
        lean = decoder_config.read(config)
    except decoder_config.NotLean as reason:
        if quantization is not None:
            raise ModelError(f"quantization: was {quantization!r}, but this model runs through transformers ({reason});"
                             f" allowed: models of the families {', '.join(decoder_config.FAMILIES)}") from None
        logger.info("%s: run by the transformers backend: %s", model_dir, reason)
        from gpu_worker.models.transformers_backend import load_transformers_model   # slow to import, rarely needed
        kernels, lacking = CpuKernels.open(device, torch.get_num_threads())
        model = load_transformers_model(model_dir, max_model_len=max_model_len, device=device, attention=partial(_attention, kernels, kv_cache_dtype),
                                        picker=picker_of(kernels), dtype=resolve_dtype(dtype, _checkpoint_dtype(config), device), **settings)
        model.slower_because = model.slower_because or lacking
        return model
    if quantization is not None:
        check_supported(quantization, lean, dtype, device)
    settings["max_model_len"] = checked_max_model_len(max_model_len, lean.max_position)
    kernels, lacking = CpuKernels.open(device, torch.get_num_threads())
    settings["picker"] = picker_of(kernels)
    chosen = resolve_dtype(dtype, _checkpoint_dtype(config), device, has_kernels=kernels is not None)
    if kernels is not None and (lacking := kernels.decoder_lacks(lean, chosen)) is not None:
        kernels = None
    if kernels is not None:
        _check_stored(kv_cache_dtype)
    if quantization is not None:
        if kernels is None:
            parts: DecoderParts = QuantizedParts(quantization, model_dir, lean, dtype)
        else:
            parts = packed_quantized(quantization, model_dir, lean, dtype, kernels.products)
        model = _decoder(lean, parts, kernels, device, settings)
    elif kernels is not None and keeps_packed(model_dir, chosen):
        model = _decoder(lean, packed_checkpoint(model_dir, lean, kernels.products), kernels, device, settings)
    else:
        with weights.Checkpoint(model_dir) as checkpoint:
            products = TorchProducts() if kernels is None else kernels.products
            parts = PlainParts(checkpoint, lean, chosen, device, weights.fingerprint(model_dir), products)
            model = _decoder(lean, parts, kernels, device, settings)
            checkpoint.ignore("rotary_emb.inv_freq")
            checkpoint.check_all_taken()
    model.slower_because = lacking
    return model


def _decoder(config: decoder_config.DecoderConfig, parts: DecoderParts, kernels: CpuKernels | None, device: torch.device,
             settings: dict[str, Any]) -> LoadedModel:
    if kernels is None:
        return Decoder(config, parts, device=device, attention=ReferenceAttention(), **settings)
    return KernelDecoder(config, parts, kernels, **settings)


def _attention(kernels: CpuKernels | None, kv_cache_dtype: str, layers: tuple[AttentionLayer, ...],
               dtype: torch.dtype) -> tuple[AttentionBackend, str | None]:
    """What attends where torch computes all else; and why it is not the kernels, where there are any."""
    backend, lacking = attention_backend(kernels, layers, dtype)
    if kernels is not None and backend is kernels.attention:
        _check_stored(kv_cache_dtype)
    return backend, lacking


def _check_stored(kv_cache_dtype: str) -> None:
    """The kernels store K and V as some types only; plain torch as any."""
    allowed = ["auto", *(name for name, dtype in DTYPES.items() if dtype in KV_TYPES)]
    if kv_cache_dtype not in allowed:
        raise ModelError(f"kv_cache_dtype: was {kv_cache_dtype!r}, which the CPU kernels that run this model do not store;"
                         f" allowed: {', '.join(allowed)}")


def checked_max_model_len(asked: int | None, limit: int) -> int:
    """The length that tables are made for, in tokens."""
    if asked is not None and asked > limit:
        raise ModelError(f"max_model_len: was {asked}; allowed: up to the model's own {limit} (max_position_embeddings)")
    return limit if asked is None else asked


def resolve_dtype(asked: str, stored: str | None, device: torch.device, *, has_kernels: bool = False) -> torch.dtype:
    """``auto``: bfloat16 where it is fast (by own kernels, or by torch), else float32; the log says when that
    differs from the checkpoint."""
    if asked != "auto":
        if asked == "float16" and device.type == "cpu":
            logger.warning("dtype float16 on a CPU is many times slower than bfloat16 or float32")
        return DTYPES[asked]
    if device.type == "cpu":
        chosen = "bfloat16" if has_kernels or onednn_multiplies(torch.bfloat16, device) else "float32"
    elif stored == "float16" or not torch.cuda.is_bf16_supported():
        chosen = "float16"
    else:
        chosen = "bfloat16"
    if stored is not None and stored != chosen:
        logger.info("dtype auto: the %s checkpoint is loaded as %s", stored, chosen)
    return DTYPES[chosen]


def _checkpoint_dtype(config: dict[str, Any]) -> str | None:
    stored = config.get("dtype") or config.get("torch_dtype")
    return str(stored).removeprefix("torch.") if stored else None


def _check_config(config: dict[str, Any]) -> None:
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"config.json: model_type: was {config.get('model_type')!r}; allowed: the name of an architecture")
    if config.get("quantization_config"):
        raise ModelError("config.json: quantization_config: quantized checkpoints are not supported")
    architectures = config.get("architectures") or []
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures):
        raise ModelError(f"config.json: architectures: was {architectures}; allowed: a model that generates text (…ForCausalLM)")
