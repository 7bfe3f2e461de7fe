"""Small random models, written as GGUF files the way llama.cpp's converter does.

Used by the tests of everything that reads such files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterable

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from gpu_worker.models.gguf_tensors import LAYER_NAMES, TOP_NAMES

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "rms_norm_eps": 1e-6}


def small_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A random model of the family ``kind``; ``changes`` to its config."""
    torch.manual_seed(0)
    model = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[kind](
        {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**SIZES | changes)).eval()
    with torch.no_grad():    # transformers starts norms at one and biases at zero, which hides a missing one
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
    return model


def gguf_name(name: str) -> str:
    """What llama.cpp calls the checkpoint's tensor ``name``."""
    *body, kind = name.split(".")
    layer = {v: k for k, v in LAYER_NAMES.items()}
    top = {v: k for k, v in TOP_NAMES.items()}
    if body[1:2] == ["layers"]:
        return f"blk.{body[2]}.{layer['.'.join(body[3:])]}.{kind}"
    return f"{top['.'.join(body)]}.{kind}"


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """The order that llama.cpp keeps Llama's Q and K rows in."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(path: Path, model: PreTrainedModel, kind: str, *, tokens: int = 300, pre: str | None = "gpt-2",
               tokenizer: str = "gpt2", extra: Iterable[Callable[[GGUFWriter], None]] = (),
               packed: dict[str, np.ndarray] | None = None, packed_type: GGMLQuantizationType = GGMLQuantizationType.Q8_0) -> Path:
    """``model`` as the file ``path``; ``packed`` are tensors already in ``packed_type``."""
    config = model.config
    writer = GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model(tokenizer)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    names = ["<s>", "</s>", "t", "0"] + [f"t{i}" for i in range(tokens - 4)]
    writer.add_token_list(names)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (tokens - 2))
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for add in extra:
        add(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values, target = tensor.numpy(), gguf_name(name)
        if packed and name in packed:
            writer.add_tensor(target, packed[name], raw_dtype=packed_type)
            continue
        if kind == "llama" and ".attn_q." in target:
            values = permuted(values, config.num_attention_heads)
        if kind == "llama" and ".attn_k." in target:
            values = permuted(values, config.num_key_value_heads)
        writer.add_tensor(target, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
