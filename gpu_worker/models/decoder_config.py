"""What the lean decoder reads from a config.json, and what it leaves to the transformers backend.

``read`` returns a ``DecoderConfig``, or raises ``NotLean`` with the field that this decoder
lacks: every field of the file is either read here, known not to touch the arithmetic, or
sends the model elsewhere.  Spellings before and after transformers 5 are both read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_worker.models.spec import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ARITHMETIC_FIELDS = frozenset((
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rms_norm_eps", "hidden_act", "max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"))
NEUTRAL_FIELDS = frozenset((
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "attention_dropout", "initializer_range", "pretraining_tp", "_name_or_path", "name_or_path", "auto_map",
    "is_llama_config", "return_dict", "id2label", "label2id", "problem_type", "unsloth_version", "unsloth_fixed",
    "transformers.js_config", "tokenizer_class", "_attn_implementation_autoset"))
ROPE_FIELDS = {
    "default": frozenset(),
    "linear": frozenset(("factor",)),
    "llama3": frozenset(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
}


class NotLean(Exception):
    """The lean decoder lacks something; the message names the field."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The arithmetic of a Llama-family model."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int                  # tokens
    rms_norm_eps: float
    tied_head: bool
    qkv_bias: bool
    output_bias: bool                  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]    # per layer: tokens a query sees, None: all before it
    rope_theta: float
    rope: dict[str, Any]               # rope_type and its parameters


def read(config: dict[str, Any]) -> DecoderConfig:
    """The decoder's settings; NotLean names a field that it has no arithmetic for."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise NotLean(f"model_type {family!r}")
    for name, value in config.items():
        if name not in ARITHMETIC_FIELDS and name not in NEUTRAL_FIELDS and value not in (None, False, {}, []):
            raise NotLean(f"{name} = {value!r}")
    if config.get("hidden_act", "silu") != "silu":
        raise NotLean(f"hidden_act = {config['hidden_act']!r}")
    heads = _number(config, "num_attention_heads")
    theta, rope = _rope(config)
    biased = bool(config.get("attention_bias")) if family in ("llama", "qwen3") else False
    return DecoderConfig(
        family=family, hidden_size=_number(config, "hidden_size"), intermediate_size=_number(config, "intermediate_size"),
        num_layers=_number(config, "num_hidden_layers"), num_heads=heads, num_kv_heads=_kv_heads(config, heads),
        head_dim=_head_dim(config, heads), vocab_size=_number(config, "vocab_size"),
        max_position=_number(config, "max_position_embeddings"), rms_norm_eps=_number(config, "rms_norm_eps"),
        tied_head=bool(config.get("tie_word_embeddings", False)), qkv_bias=biased or family == "qwen2", output_bias=biased,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias")), qk_norm=family == "qwen3",
        windows=_windows(config), rope_theta=theta, rope=rope)


def inverse_frequencies(config: DecoderConfig) -> Tensor:
    """float32 [head_dim // 2] radians a position, computed in float32 as the models were trained."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta ** exponent)
    rope = config.rope
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        original, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wavelength = 2 * math.pi / frequency
        slow = torch.where(wavelength > original / low, frequency / factor, frequency)
        share = (original / wavelength - low) / (high - low)
        between = (wavelength <= original / low) & (wavelength >= original / high)
        return torch.where(between, (1 - share) * frequency / factor + share * frequency, slow)
    return frequency


def _number(config: dict[str, Any], name: str) -> Any:
    value = config.get(name)
    if value is None:
        raise NotLean(f"{name} is not given")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {name}: was {value!r}; allowed: a number above 0")
    return value


def _kv_heads(config: dict[str, Any], heads: int) -> int:
    if config.get("num_key_value_heads") is None and config["model_type"] == "llama":
        return heads
    kv_heads = _number(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ModelError(f"config.json: num_key_value_heads: was {kv_heads}; allowed: a divisor of num_attention_heads, {heads}")
    return kv_heads


def _head_dim(config: dict[str, Any], heads: int) -> int:
    if config.get("head_dim") is not None or config["model_type"] == "qwen3":
        return _number(config, "head_dim")
    return _number(config, "hidden_size") // heads


def _windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    layers = _number(config, "num_hidden_layers")
    window = config.get("sliding_window")
    if config["model_type"] == "llama":
        if window is not None or config.get("layer_types"):
            raise NotLean("sliding_window or layer_types of a llama model")
        return (None,) * layers
    if config["model_type"] == "mistral":
        if config.get("layer_types"):
            raise NotLean(f"layer_types = {config['layer_types']!r}")
        return (window,) * layers
    if not config.get("use_sliding_window", False):
        window = None
    kinds = config.get("layer_types")
    if kinds is None:
        if window is not None and config.get("max_window_layers") is None:
            raise NotLean("max_window_layers is not given")
        return tuple(window if window is not None and i >= config["max_window_layers"] else None for i in range(layers))
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise NotLean(f"layer_types = {kinds!r}")
    if window is None and "sliding_attention" in kinds:
        raise NotLean("layer_types with sliding_attention, but no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """(rope_theta, rope_type and its parameters), from either spelling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if rope_type not in ROPE_FIELDS:
        raise NotLean(f"rope_type = {rope_type!r}")
    needed = ROPE_FIELDS[rope_type]
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    if set(rope) != needed:
        raise NotLean(f"rope parameters {sorted(set(rope) ^ needed)} of rope_type {rope_type!r}")
    return float(theta), {"rope_type": rope_type, **rope}
