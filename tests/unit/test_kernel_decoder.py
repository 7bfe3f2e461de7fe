"""The decoder by compiled kernels: the same model as in plain torch, and the same bits however its tokens come."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from gpu_worker.attention.interface import AttentionMetadata
from gpu_worker.kernels.decoder import DecoderTimes
from gpu_worker.kv_cache import KVCache
from gpu_worker.models import cpu_kernels
from gpu_worker.models.converted import models_dir
from gpu_worker.models.decoder import Decoder
from gpu_worker.models.kernel_decoder import KernelDecoder
from gpu_worker.models.registry import load_model
from gpu_worker.models.spec import LoadedModel, ModelError
from tiny_models import write_gpt_neox, write_random_model, write_tiny_llama
from private_cache import use_private_cache
from whole_prompt import logits_of

CPU = torch.device("cpu")
IDS = [(29 * i) % 250 + 3 for i in range(70)]


def qwen3(path: Path) -> Path:
    from transformers import Qwen3Config

    return write_random_model(path, Qwen3Config(
        vocab_size=257, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=128, initializer_range=0.1))


def biased_llama(path: Path) -> Path:
    from transformers import LlamaConfig

    return write_random_model(path, LlamaConfig(
        vocab_size=270, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=128, initializer_range=0.1, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3))


def windowed_mistral(path: Path) -> Path:
    from transformers import MistralConfig

    return write_random_model(path, MistralConfig(
        vocab_size=257, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=48, max_position_embeddings=128, initializer_range=0.1, sliding_window=21))


MODELS = pytest.mark.parametrize("write", [qwen3, biased_llama, windowed_mistral])
MODES = pytest.mark.parametrize("mode", [("float32", None), ("bfloat16", None), ("float32", "int8"), ("float32", "int4")], ids=str)


@pytest.fixture(autouse=True)
def quantized_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a cache directory of their own."""
    use_private_cache(monkeypatch, tmp_path / "cache")


def load(model_dir: Path, mode: tuple[str, str | None], kv: str = "auto", threads: int = 2) -> LoadedModel:
    return load_model(model_dir, dtype=mode[0], device=CPU, quantization=mode[1], kv_cache_dtype=kv, num_threads=threads)


@MODELS
@MODES
def test_the_same_model_as_in_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, mode) -> None:
    model = load(write(tmp_path / "model"), mode)
    monkeypatch.setenv(cpu_kernels.DISABLED, "1")
    reference = load(tmp_path / "model", mode)
    assert (type(model), type(reference)) == (KernelDecoder, Decoder)
    found, expected = logits_of(model, IDS), logits_of(reference, IDS)
    apart = float((found - expected).square().mean().sqrt() / expected.std())
    assert apart < {("float32", None): 3e-6, ("bfloat16", None): 0.03}.get(mode, 0.03)     # int8 rows may round apart


def in_steps(model: LoadedModel, chunks: list[int]) -> torch.Tensor:
    """Logits of all tokens, computed in ``chunks``; blocks in descending order, full of not-a-number before."""
    kv = KVCache(model.spec, 4, model.spec.kv_dtype, CPU)
    kv.fill_with_nan()
    logits, begin = [], 0
    for count in chunks:
        positions = torch.arange(begin, begin + count)
        lens, ends = torch.tensor([count], dtype=torch.int32), torch.tensor([begin + count], dtype=torch.int32)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, count], dtype=torch.int32), seq_lens=ends,
            block_table=torch.tensor([[3, 2, 1, 0]], dtype=torch.int32), slot_mapping=(3 - positions // 32) * 32 + positions % 32,
            query_lens_host=lens.numpy(), seq_lens_host=ends.numpy(), num_tokens=count)
        hidden = model.forward(torch.tensor(IDS[begin:begin + count]), positions, metadata, kv)
        logits.append(model.compute_logits(hidden))
        begin += count
    return torch.cat(logits)


@MODES
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_the_same_bits_in_any_chunks(tmp_path: Path, mode, kv: str) -> None:
    model = load(windowed_mistral(tmp_path / "model"), mode, kv)
    expected = in_steps(model, [len(IDS)])
    assert torch.isfinite(expected).all()
    for chunks in ([1] * len(IDS), [33, 1, 1, 20, 15], [2, 3, 64, 1]):
        assert torch.equal(in_steps(model, chunks), expected)
    assert torch.equal(in_steps(load(tmp_path / "model", mode, kv, threads=1), [40, 30]), expected)


def test_the_call_says_where_its_time_went(tmp_path: Path) -> None:
    model = load(windowed_mistral(tmp_path / "model"), ("bfloat16", None))
    expected = in_steps(model, [40, 30])
    model.call.times = times = DecoderTimes()
    began_ns = time.perf_counter_ns()
    assert torch.equal(in_steps(model, [40, 30]), expected)
    passed_ns = time.perf_counter_ns() - began_ns
    parts = times.products, times.attention, times.rest
    assert min(parts) > 0 and sum(parts) <= passed_ns


def test_what_the_kernels_lack_runs_in_torch(tmp_path: Path) -> None:
    model = load(write_tiny_llama(tmp_path / "model"), ("float32", None))
    assert isinstance(model, Decoder)
    assert "heads of 8 are not multiples of 16" in model.slower_because


def test_without_a_compiler_the_reason_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    model = load_model(qwen3(tmp_path / "model"), dtype="float32", device=CPU, num_threads=1)
    assert isinstance(model, Decoder)
    assert "no C++ compiler was found" in model.slower_because


@pytest.mark.parametrize("mode", [("bfloat16", None), ("float32", None), ("auto", "int4")], ids=str)
def test_kv_that_the_kernels_do_not_store_is_refused_by_name(tmp_path: Path, mode) -> None:
    with pytest.raises(ModelError, match="^kv_cache_dtype: was 'float16'.*; allowed: auto, float32, bfloat16, int8$"):
        load(qwen3(tmp_path / "model"), mode, "float16")
    assert not models_dir().exists()          # before anything is made


def test_kv_that_the_kernels_do_not_store_is_refused_beside_transformers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="^kv_cache_dtype: was 'float16'.*; allowed: auto, float32, bfloat16, int8$"):
        load(write_gpt_neox(tmp_path / "model"), ("bfloat16", None), "float16")


@pytest.mark.parametrize("write", [qwen3, write_gpt_neox])
def test_float16_models_keep_float16_kv(tmp_path: Path, write) -> None:
    """They run in plain torch, which stores it."""
    model = load(write(tmp_path / "model"), ("float16", None), "float16")
    assert model.spec.kv_dtype == torch.float16 and bool(torch.isfinite(logits_of(model, IDS)).all())
