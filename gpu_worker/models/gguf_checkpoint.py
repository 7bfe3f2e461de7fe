"""A GGUF file as a checkpoint directory: ``python -m gpu_worker.models.gguf_checkpoint FILE``.

Started by launch.py; prints the directory as its last line on stdout.  Converted once, under
a lock, beside its final place and renamed; found again by the file's content and
``CONVERTER_VERSION``.  Architectures llama and qwen2; whatever this converter does not know
is refused by name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpu_worker.models.converted import ConversionError, converted, report

CONVERTER_VERSION = 1
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
TENSORS = {       # GGUF → checkpoint, of a layer
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def convert(gguf_path: Path, target: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into ``target``.

    Matrices keep the widest float type they have in the file; quantized ones become bfloat16.
    """
    from gguf import GGUFReader
    from gpu_worker.models.gguf_tokenizer import TokenizerRefused, build

    try:
        reader = GGUFReader(gguf_path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, OSError) as error:
        raise ConversionError(f"{gguf_path}: not a readable GGUF file: {error}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = read_config(fields, tensors)
    try:
        tokenizer, tokenizer_config = build(fields)
    except TokenizerRefused as error:
        raise ConversionError(f"{gguf_path}: {error}") from None
    _write_tensors(tensors, config, target / "model.safetensors")
    special = {name: fields[f"tokenizer.ggml.{name}"] for name in ("bos_token_id", "eos_token_id")
               if f"tokenizer.ggml.{name}" in fields}
    tokenizer.save(str(target / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", tokenizer_config), ("generation_config.json", special),
                          ("config.json", config | special)):
        (target / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def read_config(fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """config.json from the file's metadata; ConversionError names what we do not have."""
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ConversionError(f"general.architecture: was {kind!r}; allowed: {', '.join(ARCHITECTURES)}")

    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{name}", default)
        if value is None:
            raise ConversionError(f"{kind}.{name}: missing in the GGUF file")
        return value

    if field("expert_count", 0):
        raise ConversionError(f"{kind}.expert_count: was {field('expert_count')}; mixtures of experts are not read from GGUF")
    heads, hidden = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", hidden // heads)
    if field("rope.dimension_count", head_dim) != head_dim:
        raise ConversionError(f"{kind}.rope.dimension_count: was {field('rope.dimension_count')}; allowed: the head size, {head_dim}")
    theta = field("rope.freq_base", 10000.0)
    return {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "hidden_size": hidden,
        "intermediate_size": field("feed_forward_length"), "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads, "num_key_value_heads": field("attention.head_count_kv", heads), "head_dim": head_dim,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]), "max_position_embeddings": field("context_length"),
        "rms_norm_eps": _shortest(field("attention.layer_norm_rms_epsilon")), "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors, "dtype": _stored_dtype(tensors),
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in tensors,
        "rope_parameters": {"rope_theta": theta, **_rope(fields, kind, tensors, theta, head_dim)}}


def _shortest(value: float) -> float:
    """The decimal number that was rounded to float32 when the file was written."""
    return float(f"{value:.7g}")


def _stored_dtype(tensors: dict[str, Any]) -> str:
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) == 2}
    return "float32" if "F32" in kinds else "float16" if "F16" in kinds else "bfloat16"


def _rope(fields: dict[str, Any], kind: str, tensors: dict[str, Any], theta: float, head_dim: int) -> dict[str, Any]:
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if ROPE_FACTORS in tensors:
        return _llama3_rope(tensors[ROPE_FACTORS].data.reshape(-1), theta, head_dim)
    if scaling == "none":
        return {"rope_type": "default"}
    if scaling == "linear":
        return {"rope_type": "linear", "factor": float(fields[f"{kind}.rope.scaling.factor"])}
    raise ConversionError(f"{kind}.rope.scaling.type: was {scaling!r}; allowed: none, linear, or llama3's {ROPE_FACTORS}")


def _llama3_rope(factors: Any, theta: float, head_dim: int) -> dict[str, Any]:
    """GGUF stores llama3's scaling as one divisor a frequency: find the parameters that give it."""
    import numpy as np

    rope = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3_ROPE}
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = (rope[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    share = np.clip((original / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - share) / rope["factor"] + share), rtol=1e-4):
        raise ConversionError(f"{ROPE_FACTORS}: scales frequencies otherwise than llama3 does; not supported")
    return rope


def _write_tensors(tensors: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    import torch
    from rich.console import Console
    from rich.progress import track
    from safetensors.torch import save_file

    dtype = getattr(torch, config["dtype"])
    written = {}
    quiet = not sys.stderr.isatty()
    for name, tensor in track(tensors.items(), "converting", console=Console(stderr=True), disable=quiet):
        if name != ROPE_FACTORS:
            written[_checkpoint_name(name)] = torch.from_numpy(_values(name, tensor, config)).to(dtype)
    save_file(written, path, metadata={"format": "pt"})


def _checkpoint_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in TOP_TENSORS:
        return f"{TOP_TENSORS[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in TENSORS:
        return f"model.layers.{parts[1]}.{TENSORS[parts[2]]}.{parts[3]}"
    raise ConversionError(f"tensor {name}: this architecture has no place for it")


def _values(name: str, tensor: Any, config: dict[str, Any]) -> Any:
    """float32, in the order that the checkpoint has: GGUF permutes the rows of Llama's Q and K."""
    import numpy as np
    from gguf import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ConversionError(f"tensor {name}: the quantization {tensor.tensor_type.name} is not supported") from None
    if config["model_type"] == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
        pairs = values.reshape(-1, config["head_dim"] // 2, 2, *values.shape[1:])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return np.require(values, np.float32, ["C", "W"])     # a mapped tensor is read-only


def main() -> int:
    path = Path(sys.argv[1]).absolute()
    return report(f"model {path.name}", lambda: converted(path, f"gguf{CONVERTER_VERSION}", convert))


if __name__ == "__main__":
    sys.exit(main())
