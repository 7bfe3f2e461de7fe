"""The transformers backend at load: what it takes, and what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gpu_worker.attention.cpu import CpuAttention
from gpu_worker.attention.reference import ReferenceAttention
from gpu_worker.models.cpu_kernels import CpuKernels
from gpu_worker.models.registry import ModelError, load_model
from gpu_worker.models.spec import LoadedModel
from tiny_models import write_random_model
from whole_prompt import logits_of

SIZES = {"vocab_size": 331, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1,
         "pad_token_id": None}


def load(path: Path, family: str, dtype: str = "float32", kv_cache_dtype: str = "auto", **changes: Any) -> LoadedModel:
    """A random model of the family, whose load compares it with its own forward."""
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    return load_model(write_random_model(path, config), dtype=dtype, kv_cache_dtype=kv_cache_dtype,
                      device=torch.device("cpu"), num_threads=1)


@pytest.mark.parametrize(("family", "changes"), [
    ("GPT2", {"n_inner": 128}), ("Mixtral", {"num_local_experts": 4}), ("Olmo2", {}), ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64})])
def test_other_architectures_load(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    spec = load(tmp_path, family, **changes).spec
    assert (spec.backend, spec.num_layers, spec.vocab_size, spec.eos_token_ids) == ("transformers", 2, 331, (1,))
    assert spec.supports_bit_exact is (family != "Mixtral")      # of experts nothing is promised


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("Bloom", {"n_layer": 2, "n_head": 4}, "model_type bloom: does not support paged attention"),
    ("Falcon", {}, "model_type falcon: does not support paged attention"),
    ("Falcon", {"alibi": True}, "model_type falcon: does not support paged attention"),
    ("GPTNeo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
     "model_type gpt_neo: does not support paged attention"),
    ("Mpt", {"n_layers": 2, "n_heads": 4, "d_model": 64}, "model_type mpt: cannot run on paged attention"),
    ("StableLm", {}, "StableLmAttention: does not hand keyword arguments through to its attention"),
    ("GptOss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2},
     "GptOssAttention: asks its attention for s_aux, which paged attention lacks"),
    ("Xmod", {"is_decoder": True}, "model_type xmod: cannot run on paged attention: Input language unknown"),
    ("Mamba", {}, "model_type mamba: does not support paged attention"),
    ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
     "rope_type dynamic: not supported, a request's output would depend on its neighbours"),
])
def test_refused_by_name(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path, family, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["GPTNeoX", "Gemma2"])
def test_half_precision(tmp_path: Path, family: str, dtype: str) -> None:
    assert load(tmp_path, family, dtype, head_dim=16).spec.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "int8"])
def test_attention_by_the_kernels_where_they_know_the_heads(tmp_path: Path, kv_cache_dtype: str) -> None:
    """And with the outputs of the plain torch attention."""
    if CpuKernels.open(torch.device("cpu"), 1)[0] is None:
        pytest.skip("no compiler, or no AVX2")
    model = load(tmp_path / "gemma", "Gemma2", head_dim=16, kv_cache_dtype=kv_cache_dtype)
    assert isinstance(model.attention, CpuAttention) and model.slower_because is None
    ids = [(29 * i) % 250 + 3 for i in range(70)]
    found = logits_of(model, ids)
    model.attention = ReferenceAttention()
    assert (found - logits_of(model, ids)).abs().max() < 1e-3 * found.std()
    small = load(tmp_path / "small", "Gemma2", head_dim=8)
    assert isinstance(small.attention, ReferenceAttention) and "heads of 8" in small.slower_because
