"""Whole models in the quantized modes: near the float32 model, made once, from GGUF blocks exactly, refused where they do not go."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gguf_files import permuted, small_model, write_gguf
from gpu_worker.models.gguf_checkpoint import CONVERTER_VERSION, convert_and_keep
from gpu_worker.models.converted import GGUF_NAME, converted, models_dir
from gpu_worker.models.registry import load_model
from gpu_worker.models.spec import LoadedModel, ModelError
from gpu_worker.quantization import modes
from gpu_worker.quantization.blocks import Block4Weight, Block8Weight
from gpu_worker.quantization.channels import ChannelWeight
from gpu_worker.startup import load_worker
from protocol.config import EngineConfig, ModelConfig, SchedulerConfig
from tiny_models import write_random_model, write_tiny_llama
from private_cache import use_private_cache
from whole_prompt import logits_of

CPU = torch.device("cpu")
IDS = [(17 * i) % 250 + 3 for i in range(70)]
MODES = pytest.mark.parametrize("mode", ["int8", "int4"])
Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of its own for each test."""
    return use_private_cache(monkeypatch, tmp_path / "cache")


def load(model_dir: Path, mode: str | None, dtype: str = "float32") -> LoadedModel:
    return load_model(model_dir, dtype=dtype, device=CPU, quantization=mode, num_threads=1)


def error_of(model: LoadedModel, reference: LoadedModel) -> float:
    """Root of the squared difference of all logits, as part of their own spread."""
    expected = logits_of(reference, IDS)
    return float((logits_of(model, IDS) - expected).square().mean().sqrt() / expected.std())


def qwen3(path: Path) -> Path:
    from transformers import Qwen3Config

    return write_random_model(path, Qwen3Config(
        vocab_size=257, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=True))


def qwen2(path: Path) -> Path:
    from transformers import Qwen2Config

    return write_random_model(path, Qwen2Config(
        vocab_size=257, hidden_size=160, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=False))


def biased_llama(path: Path) -> Path:
    from transformers import LlamaConfig

    return write_random_model(path, LlamaConfig(
        vocab_size=257, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        head_dim=24, max_position_embeddings=128, initializer_range=0.1, attention_bias=True, mlp_bias=True))


@MODES
@pytest.mark.parametrize("write", [write_tiny_llama, qwen3, qwen2, biased_llama])
def test_near_the_float32_model(tmp_path: Path, write, mode: str) -> None:
    """Random weights are harder to quantize than trained ones; what is left out or doubled costs far more."""
    model_dir = write(tmp_path / "model")
    assert error_of(load(model_dir, mode), load(model_dir, None)) < {"int8": 0.06, "int4": 0.5}[mode]


@MODES
def test_between_the_products_there_is_float32(tiny_llama_dir: Path, mode: str) -> None:
    spec = load(tiny_llama_dir, mode, "auto").spec
    assert (spec.dtype, spec.kv_dtype, spec.quantization, spec.supports_bit_exact) == (torch.float32, torch.bfloat16, mode, True)
    assert load(tiny_llama_dir, mode, "float32").spec.kv_dtype == torch.float32
    assert error_of(load(tiny_llama_dir, mode, "bfloat16"), load(tiny_llama_dir, mode)) < 0.1


def test_each_product_has_the_weights_of_its_mode(tiny_llama_dir: Path) -> None:
    int8, int4 = load(tiny_llama_dir, "int8"), load(tiny_llama_dir, "int4")
    assert all(isinstance(product.weight, ChannelWeight) for product in (*int8.linears(), int8.head()))
    assert [product.group for product in int8.linears()[:4]] == [None, None, None, 32]
    assert all(isinstance(product.weight, Block4Weight) and product.group == 32 for product in int4.linears())
    assert isinstance(int4.head().weight, Block8Weight) and int4.head().group == 32


@MODES
def test_made_once_and_loaded_after_that(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    first = load(tiny_llama_dir, mode)
    kept = {path: path.read_bytes() for path in sorted(models_dir().rglob("*.safetensors"))}
    assert len(kept) == 3          # the ends, two layers

    def again(*_arguments: object) -> None:
        raise AssertionError("made twice")

    monkeypatch.setattr(modes, "_make", again)
    second = load(tiny_llama_dir, mode)
    assert second.weights_fingerprint == first.weights_fingerprint
    assert torch.equal(logits_of(second, IDS), logits_of(first, IDS))
    assert {path: path.read_bytes() for path in sorted(models_dir().rglob("*.safetensors"))} == kept


@MODES
def test_another_checkpoint_is_quantized_anew(tmp_path: Path, mode: str) -> None:
    models = [load(write_tiny_llama(tmp_path / str(seed), seed=seed), mode) for seed in (1, 2)]
    assert models[0].weights_fingerprint != models[1].weights_fingerprint
    assert len(list(models_dir().glob(f"{mode}-*"))) == 2


def test_the_fingerprint_names_mode_and_kv_dtype(tiny_llama_dir: Path) -> None:
    def fingerprint(**model: object) -> str:
        config = ModelConfig(**({"device": "cpu", "num_threads": 1} | model))
        return load_worker(EngineConfig(model=config, scheduler=SchedulerConfig(max_num_seqs=2), model_dir=str(tiny_llama_dir)))

    workers = [fingerprint(dtype=dtype, quantization=mode) for mode in (None, "int8", "int4") for dtype in ("bfloat16", "float32")]
    assert len({worker.numerics_fingerprint for worker in workers}) == 6
    assert [worker.dtype for worker in workers[1:]] == ["float32", "int8", "int8", "int4", "int4"]
    assert [worker.bit_exact for worker in workers[2:]] == [True] * 4


def packed(model, kind: gguf.GGMLQuantizationType, part: str) -> dict[str, np.ndarray]:
    """The matrices whose names hold ``part``, as a file has them: Q and K permuted."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2 and part in name:
            values = tensor.numpy()
            turned = heads.get(name.split(".")[-2]) if model.config.model_type == "llama" else None
            found[name] = gguf.quantize(np.ascontiguousarray(permuted(values, turned) if turned else values), kind)
    return found


def from_gguf(tmp_path: Path, kind: str, block_type: gguf.GGMLQuantizationType, part: str, **changes: object) -> Path:
    model = small_model(kind, **changes)
    path = write_gguf(tmp_path / "m.gguf", model, kind, packed=packed(model, block_type, part), packed_type=block_type)
    return converted(path, f"gguf{CONVERTER_VERSION}", convert_and_keep)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("block_type", [gguf.GGMLQuantizationType.Q4_0, Q4_1])
def test_blocks_of_the_gguf_file_are_exact(tmp_path: Path, kind: str, block_type: gguf.GGMLQuantizationType) -> None:
    """Rows of Q and K move back as the checkpoint's have; the checkpoint itself is rounded to bfloat16."""
    model_dir = from_gguf(tmp_path, kind, block_type, "_proj", tie_word_embeddings=False)
    exact, checkpoint = load(model_dir, "int4"), load(model_dir, None)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for product, name in ((exact.linears()[5], "blk.1.attn_output"), (exact.linears()[7], "blk.1.ffn_down")):
        stored = gguf.dequantize(tensors[f"{name}.weight"].data, block_type)
        assert np.array_equal(product.weight.dequantized().numpy(), stored)
    assert error_of(exact, checkpoint) < 0.05          # int8 rows alone; new blocks cost ten times as much


def test_the_files_own_head(tmp_path: Path) -> None:
    model_dir = from_gguf(tmp_path, "llama", Q8_0, "embed_tokens", tie_word_embeddings=True)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    head = load(model_dir, "int4").head().weight
    assert np.array_equal(head.dequantized().numpy(), gguf.dequantize(tensors["token_embd.weight"].data, Q8_0))


def test_the_gguf_file_may_not_be_another_one(tmp_path: Path) -> None:
    model_dir = from_gguf(tmp_path, "llama", Q4_1, "_proj")
    kept = model_dir / GGUF_NAME
    assert kept.read_bytes() == (tmp_path / "m.gguf").read_bytes()
    other = small_model("llama")
    torch.nn.init.normal_(other.model.layers[1].mlp.down_proj.weight)
    kept.unlink()
    write_gguf(kept, other, "llama", packed=packed(other, Q4_1, "_proj"), packed_type=Q4_1)
    with pytest.raises(ModelError, match=f"{kept}: model.layers.1.mlp.down_proj differs from the checkpoint beside it"):
        load(model_dir, "int4")
    kept.unlink()
    kept.symlink_to(tmp_path / "gone.gguf")
    with pytest.raises(ModelError, match="gone.gguf: no such file"):
        load(model_dir, "int4")
    assert not list(models_dir().glob("int4-*"))


def with_other_rows(content: bytes, name: bytes, rows: int) -> bytes:
    """A tensor of two dimensions with another number of rows, in the header of a GGUF file."""
    at = content.index(name) + len(name) + 4 + 8
    return content[:at] + rows.to_bytes(8, "little") + content[at + 8:]


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: b"GGUG" + content[4:], lambda content: content[:200], lambda content: content[:-40_000],
    lambda content: content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"),
    lambda content: with_other_rows(content, b"blk.1.attn_q.weight", 8)])
def test_a_damaged_gguf_file_is_named(tmp_path: Path, damage) -> None:
    model_dir = from_gguf(tmp_path, "llama", Q4_1, "_proj")
    path = model_dir / GGUF_NAME
    content = path.read_bytes()
    path.unlink()                   # the file that was converted is the same one
    path.write_bytes(damage(content))
    with pytest.raises(ModelError) as caught:
        load(model_dir, "int4")
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith("; allowed: the file that the checkpoint was converted from")
    assert not list(models_dir().glob("int4-*"))


def test_default_model_is_its_file(default_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Q and a down_proj of the default model against gguf's own reader, and the head."""
    config = json.loads((default_model_dir / "config.json").read_text())
    monkeypatch.setenv("FOLOVLLM_DISABLE_KERNELS", "1")      # whose weights stand in another order
    model = load(default_model_dir, "int4")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(default_model_dir / GGUF_NAME).tensors}

    def stored(name: str) -> np.ndarray:
        return gguf.dequantize(tensors[f"{name}.weight"].data, tensors[f"{name}.weight"].tensor_type)

    query = model.linears()[4 * 3].weight.dequantized().numpy()[:config["hidden_size"]]
    assert np.array_equal(permuted(query, config["num_attention_heads"]), stored("blk.3.attn_q"))
    assert np.array_equal(model.linears()[4 * 29 + 3].weight.dequantized().numpy(), stored("blk.29.ffn_down"))
    assert np.array_equal(model.head().weight.dequantized().numpy()[:1000], stored("token_embd")[:1000])


def neox(path: Path) -> Path:
    from tiny_models import write_gpt_neox

    return write_gpt_neox(path)


@pytest.mark.parametrize(("write", "options", "message"), [
    (neox, {}, "quantization: was 'int8', but this model runs through transformers (model_type 'gpt_neox'); allowed: models of the"),
    (lambda path: write_tiny_llama(path, hidden_size=48), {}, "quantization: was 'int8', but qkv of this model has 48 inputs"),
    (lambda path: write_tiny_llama(path, intermediate_size=72), {}, "quantization: was 'int8', but down of this model has 72 inputs"),
    (write_tiny_llama, {"dtype": "float16"}, "quantization: was 'int8' beside dtype 'float16'; allowed: with dtype auto, float32 or"),
    (write_tiny_llama, {"device": torch.device("cuda")}, "quantization: was 'int8' on cuda; allowed: with device 'cpu'"),
])
def test_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture, write, options: dict, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(write(tmp_path / "model"), **({"dtype": "auto", "device": CPU, "quantization": "int8", "num_threads": 1} | options))
    assert message in str(caught.value)
    assert not models_dir().exists() and not caplog.records      # a refusal is one sentence
