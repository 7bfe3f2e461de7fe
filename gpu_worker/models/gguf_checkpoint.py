"""A GGUF file as a checkpoint directory: ``python -m gpu_worker.models.gguf_checkpoint FILE``.

Started by launch.py; its last line on stdout is the directory, or with exit code 1 the reason
why there is none.  Converted once, under a lock, beside its final place and renamed; found again by the file's content and
``CONVERTER_VERSION``.  Architectures llama and qwen2; whatever this converter does not know
is refused by name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from gpu_worker.models.converted import GGUF_NAME, ConversionError, converted, report

CONVERTER_VERSION = 2
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
KNOWN_FIELDS = frozenset((        # of the architecture: read here, or without effect on the arithmetic
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "expert_count",
    "vocab_size", "expert_used_count", "tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned"))
ENDINGS = ("eos_token_id", "eot_token_id", "eom_token_id")     # each of them ends an answer
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def convert(gguf_path: Path, target: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into ``target``.

    ConversionError names what is wrong with the file; OSError is the disk's.
    """
    try:
        _convert(gguf_path, target)
    except (ConversionError, OSError):
        raise
    except Exception as error:     # a damaged file makes the reader raise anything
        raise ConversionError(f"not a readable GGUF file: {type(error).__name__}: {error}") from None


def convert_and_keep(gguf_path: Path, target: Path) -> None:
    """``convert``, and the file itself under another name beside the checkpoint: int4 takes its blocks."""
    convert(gguf_path, target)
    whole = gguf_path.resolve()
    try:
        os.link(whole, target / GGUF_NAME)
    except OSError:      # another disk, or not ours
        (target / GGUF_NAME).symlink_to(whole)


def _convert(gguf_path: Path, target: Path) -> None:
    # Only here: a start that finds the model converted must not wait for these.
    from gguf import GGUFReader
    from gpu_worker.models import gguf_tensors
    from gpu_worker.models.gguf_tokenizer import build

    if not gguf_path.stat().st_size:
        raise ConversionError("the file is empty")
    reader = GGUFReader(gguf_path)
    if reader.byte_order == "S":
        raise ConversionError("the file is big-endian; allowed: little-endian")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = read_config(fields, tensors)
    tokenizer, tokenizer_config = build(fields)
    gguf_tensors.write(tensors, target / "model.safetensors", config["head_dim"] if config["model_type"] == "llama" else None)
    special = {name: fields[f"tokenizer.ggml.{name}"] for name in ("bos_token_id", "eos_token_id")
               if f"tokenizer.ggml.{name}" in fields}
    endings = sorted({fields[f"tokenizer.ggml.{name}"] for name in ENDINGS if f"tokenizer.ggml.{name}" in fields})
    (target / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    for name, content in (("tokenizer_config.json", tokenizer_config), ("config.json", config | special),
                          ("generation_config.json", special | ({"eos_token_id": endings} if endings else {}))):
        (target / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def read_config(fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """config.json from the file's metadata; ConversionError names what we do not have."""
    from gpu_worker.models.gguf_tensors import TORCH_DTYPES, stored_type

    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ConversionError(f"general.architecture: was {kind!r}; allowed: {', '.join(ARCHITECTURES)}")
    _check_known(fields, kind)

    def number(name: str, default: float | None = None) -> Any:
        value = fields.get(f"{kind}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConversionError(f"{kind}.{name}: was {value!r}; allowed: a number above 0")
        return value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if number(name, head_dim) != head_dim:
            raise ConversionError(f"{kind}.{name}: was {number(name)}; allowed: the head size, {head_dim}")
    if "token_embd.weight" not in tensors:
        raise ConversionError("tensor token_embd.weight: missing in the file")
    vocab_size = int(tensors["token_embd.weight"].shape[1])      # GGUF names the innermost size first
    if len(fields.get("tokenizer.ggml.tokens", ())) > vocab_size:
        raise ConversionError(f"tokenizer.ggml.tokens: {len(fields['tokenizer.ggml.tokens'])} tokens; allowed:"
                              f" as many as token_embd.weight has rows, {vocab_size}")
    theta = number("rope.freq_base", 10000.0)
    return {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"), "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": number("attention.head_count_kv", heads), "head_dim": head_dim,
        "vocab_size": vocab_size, "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")), "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": TORCH_DTYPES[stored_type(tensors["token_embd.weight"])],
        **({"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors} if kind == "llama" else {}),
        "rope_parameters": {"rope_theta": theta, **_rope(fields, kind, tensors, theta, head_dim)}}


def _check_known(fields: dict[str, Any], kind: str) -> None:
    """Nothing in the file is ignored that might change what the model computes."""
    for name, value in fields.items():
        if name.startswith(f"{kind}.") and name.removeprefix(f"{kind}.") not in KNOWN_FIELDS:
            raise ConversionError(f"{name}: was {value!r}; this setting is not supported")
    if fields.get(f"{kind}.expert_count"):
        raise ConversionError(f"{kind}.expert_count: was {fields[f'{kind}.expert_count']};"
                              " mixtures of experts are not read from GGUF")
    if fields.get("split.count", 0) > 1:
        raise ConversionError(f"split.count: was {fields['split.count']}; allowed: a model in one file"
                              " (llama.cpp's gguf-split --merge makes one)")


def _shortest(value: float) -> float:
    """The decimal number that was rounded to float32 when the file was written."""
    return float(f"{value:.7g}")


def _rope(fields: dict[str, Any], kind: str, tensors: dict[str, Any], theta: float, head_dim: int) -> dict[str, Any]:
    from gpu_worker.models.gguf_tensors import ROPE_FACTORS

    scaling, factor = (fields.get(f"{kind}.rope.scaling.{name}") for name in ("type", "factor"))
    if scaling not in (None, "none", "linear"):
        raise ConversionError(f"{kind}.rope.scaling.type: was {scaling!r}; allowed: none, linear, or llama3's {ROPE_FACTORS}")
    if scaling == "linear" and not (isinstance(factor, float) and factor > 0):
        raise ConversionError(f"{kind}.rope.scaling.factor: was {factor!r}; allowed: a number above 0")
    linear = scaling == "linear" and factor != 1
    if ROPE_FACTORS in tensors:
        if linear:
            raise ConversionError(f"{kind}.rope.scaling.type: was 'linear' beside {ROPE_FACTORS}; allowed: one of them")
        return _llama3_rope(tensors[ROPE_FACTORS].data.reshape(-1), theta, head_dim)
    return {"rope_type": "linear", "factor": factor} if linear else {"rope_type": "default"}


def _llama3_rope(factors: Any, theta: float, head_dim: int) -> dict[str, Any]:
    """GGUF stores llama3's scaling as one divisor a frequency: find the parameters that give it."""
    import numpy as np
    from gpu_worker.models.gguf_tensors import ROPE_FACTORS

    rope = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3_ROPE}
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = (rope[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    share = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - share) / rope["factor"] + share)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ConversionError(f"{ROPE_FACTORS}: scales frequencies otherwise than llama3 does; not supported")
    return rope


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert a GGUF file once and print the checkpoint directory.")
    parser.add_argument("file", type=Path, help="a GGUF file of the architectures " + " and ".join(ARCHITECTURES))
    path = parser.parse_args().file.absolute()
    return report(str(path), lambda: converted(path, f"gguf{CONVERTER_VERSION}", convert_and_keep))


if __name__ == "__main__":
    sys.exit(main())
