"""Random models of every supported family in float32 against transformers: tokens and logits.

Prompts are longer than the windows, come in chunks, and run together.  The second half shows
that the comparison can fail: one changed number in the config, one bias or norm left out of
the checkpoint, and the logits lie far outside of what is allowed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_worker.models.registry import load_model
from in_process_engine import Continuation, InProcessEngine
from parity import Reference, compare, transformers_reference
from tiny_models import write_random_model

WINDOW = 21                                       # tokens
PROMPTS = (1, 2, 31, 40, 75, 130)                 # tokens
BUDGET, MAX_TOKENS = 32, 64                       # tokens
ALLOWED = 1e-4                                    # standard deviations of the logits
SIZES = {"vocab_size": 331, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1,
         "pad_token_id": None, "tie_word_embeddings": False}
THETA = {"rope_type": "default", "rope_theta": 3000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 3000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0}
WINDOWS = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
SCALED = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {     # name → backend, config class, its fields
    "llama": ("decoder", "Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": THETA}),
    "llama tied": ("decoder", "Llama", {"tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": 4}),
    "llama3 scaling": ("decoder", "Llama", {"rope_parameters": LLAMA3}),
    "linear scaling": ("decoder", "Llama", {"rope_parameters": LINEAR}),
    "mistral": ("decoder", "Mistral", {"sliding_window": WINDOW, "rope_parameters": THETA}),
    "mistral without window": ("decoder", "Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("decoder", "Qwen2", {"rope_parameters": THETA}),
    "qwen2 windows": ("decoder", "Qwen2", WINDOWS),
    "qwen3": ("decoder", "Qwen3", {"head_dim": 32, "rope_parameters": THETA}),
    "qwen3 windows": ("decoder", "Qwen3", {"head_dim": 16, "attention_bias": True} | WINDOWS),
    "gemma2": ("transformers", "Gemma2", SCALED | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}),
    "gemma3": ("transformers", "Gemma3Text", SCALED | {"num_hidden_layers": 7}),
    "gpt_neox": ("transformers", "GPTNeoX", {"rope_parameters": THETA | {"partial_rotary_factor": 0.25}}),
    "gpt_neox sequential": ("transformers", "GPTNeoX", {"use_parallel_residual": False}),
    "phi": ("transformers", "Phi", {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}}),
    "phi qk norm": ("transformers", "Phi", {"qk_layernorm": True}),
    "yarn scaling": ("transformers", "Llama", {"rope_parameters": LINEAR | {"rope_type": "yarn", "original_max_position_embeddings": 64}}),
    "gpt2": ("transformers", "GPT2", {"n_inner": 128}),
    "mixtral": ("transformers", "Mixtral", {"num_local_experts": 4, "sliding_window": WINDOW}),
}


def write(path: Path, name: str) -> Path:
    _backend, config, changes = FAMILIES[name]
    return write_random_model(path, getattr(transformers, f"{config}Config")(**SIZES | changes))


def continued(model_dir: Path, backend: str, lengths: tuple[int, ...] = PROMPTS, max_tokens: int = MAX_TOKENS) -> list[Continuation]:
    """Random prompts through our worker, as one batch in chunks."""
    model = load_model(model_dir, dtype="float32", device=torch.device("cpu"), num_threads=1, max_model_len=256)
    assert model.spec.backend == backend
    engine = InProcessEngine(model, max_model_len=256, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=BUDGET)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in lengths]
    streams = engine.generate(prompts, max_tokens)
    assert max(engine.rows_per_step) == len(lengths)
    assert len(streams[-1].chunks) > lengths[-1] // BUDGET
    return streams


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    found = compare(continued(tmp_path, FAMILIES[name][0]), transformers_reference(tmp_path))
    assert found.other_tokens == []
    assert found.largest_in_std <= ALLOWED


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Reference]]:
    """The checkpoint of a family, and the same in transformers."""
    made: dict[str, tuple[Path, Reference]] = {}

    def original(name: str) -> tuple[Path, Reference]:
        if name not in made:
            path = write(tmp_path_factory.mktemp("original"), name)
            made[name] = path, transformers_reference(path)
        return made[name]

    return original


def changed_config(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def as_before_transformers_5(config: dict[str, Any]) -> None:
    """The same settings, as older checkpoints spell them."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)


@pytest.mark.parametrize("name", ["llama", "llama3 scaling", "linear scaling", "mistral", "qwen2 windows", "qwen3"])
def test_older_spellings_of_the_config(originals: Callable[[str], tuple[Path, Reference]], tmp_path: Path, name: str) -> None:
    path, reference = originals(name)
    found = compare(continued(changed_config(path, tmp_path / "older", as_before_transformers_5), "decoder", (3, 75), 16), reference)
    assert found.largest_in_std <= ALLOWED


# --- what the comparison would find -------------------------------------------------------


def put(key: str, value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for name in path:
            config = config[name]
        assert config[key] != value
        config[key] = value

    return change


CHANGES = [
    ("llama", put("rope_theta", 3100.0, "rope_parameters")),
    ("qwen2", put("rope_theta", 3100.0, "rope_parameters")),
    ("qwen3", put("rope_theta", 10000.0, "rope_parameters")),
    ("gpt_neox", put("rope_theta", 3100.0, "rope_parameters")),
    ("phi", put("rope_theta", 3100.0, "rope_parameters")),
    ("phi", put("partial_rotary_factor", 1.0, "rope_parameters")),
    ("llama3 scaling", put("rope_parameters", THETA)),
    ("llama3 scaling", put("low_freq_factor", 2.0, "rope_parameters")),
    ("linear scaling", put("factor", 4.1, "rope_parameters")),
    ("llama", put("rms_norm_eps", 1e-3)),
    ("mistral", put("sliding_window", WINDOW - 1)),
    ("mistral", put("sliding_window", WINDOW + 1)),
    ("qwen2 windows", put("sliding_window", WINDOW + 1)),
    ("qwen3 windows", put("layer_types", ["sliding_attention"] * 3)),
    ("gemma2", put("sliding_window", WINDOW - 1)),
    ("gemma2", put("attn_logit_softcapping", 5.1)),
    ("gemma3", put("sliding_window", WINDOW + 1)),
    ("mixtral", put("sliding_window", WINDOW + 1)),
]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[f"{name} {index}" for index, (name, _change) in enumerate(CHANGES)])
def test_a_changed_setting_shows(originals: Callable[[str], tuple[Path, Reference]], tmp_path: Path, name: str,
                                 change: Callable[[dict[str, Any]], None]) -> None:
    path, reference = originals(name)
    found = compare(continued(changed_config(path, tmp_path / "changed", change), FAMILIES[name][0], (3, 75), 16), reference)
    assert found.largest_in_std > 10 * ALLOWED


def test_a_wrong_rope_base_shows_in_the_tokens_too(originals: Callable[[str], tuple[Path, Reference]], tmp_path: Path) -> None:
    path, reference = originals("llama")
    target = changed_config(path, tmp_path / "changed", put("rope_theta", 10000.0, "rope_parameters"))
    assert len(compare(continued(target, "decoder"), reference).other_tokens) > MAX_TOKENS // 8


def test_a_missing_norm_of_queries_and_keys_shows(originals: Callable[[str], tuple[Path, Reference]], tmp_path: Path) -> None:
    path, reference = originals("qwen3")
    target = changed_config(path, tmp_path / "changed", lambda config: config.update(model_type="llama", sliding_window=None, layer_types=None))
    tensors = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if "q_norm" not in name and "k_norm" not in name}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    assert compare(continued(target, "decoder", (3, 40), 4), reference).largest_in_std > 10 * ALLOWED


def kinds_of_vectors(tensors: dict[str, Tensor]) -> list[str]:
    """Biases and norms; of those in layers, the second layer's."""
    return [name for name, tensor in tensors.items() if tensor.dim() == 1 and not set("023456") & set(name.split("."))]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_neox", "phi"])
def test_a_missing_bias_or_norm_shows(originals: Callable[[str], tuple[Path, Reference]], tmp_path: Path, name: str) -> None:
    path, reference = originals(name)
    tensors = load_file(path / "model.safetensors")
    kinds = kinds_of_vectors(tensors)
    assert len(kinds) >= 5
    for number, kind in enumerate(kinds):
        target = tmp_path / str(number)
        shutil.copytree(path, target)
        neutral = 0.0 if kind.endswith("bias") or name.startswith("gemma") else 1.0      # Gemma's norms multiply by 1 + weight
        save_file(tensors | {kind: torch.full_like(tensors[kind], neutral)}, target / "model.safetensors", metadata={"format": "pt"})
        found = compare(continued(target, FAMILIES[name][0], (3, 40), 4), reference)
        assert found.largest_in_std > 10 * ALLOWED, kind
