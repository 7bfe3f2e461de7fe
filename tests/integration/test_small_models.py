"""Small random models through all processes: what their files say is what they do."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from folovllm import LLMEngine, SamplingParams
from gguf_files import small_model, write_gguf
from gpu_worker.models.registry import load_model
from in_process_engine import Continuation, InProcessEngine
from private_cache import use_private_cache
from tiny_models import write_byte_tokenizer, write_tiny_llama

MAX_TOKENS = 40
SETTINGS = {"dtype": "float32", "num_threads": 1, "num_kv_blocks": 64, "max_model_len": 128}
PROMPTS = [[3 + (7 * row + 3 * i) % 250 for i in range(1 + 5 * row)] for row in range(8)]


def continued(model_dir: Path) -> list[Continuation]:
    """All prompts by the worker's runner, EOS ignored."""
    model = load_model(model_dir, dtype="float32", device=torch.device("cpu"), num_threads=1)
    return InProcessEngine(model, max_model_len=128, num_blocks=64, max_num_seqs=8).generate(PROMPTS, MAX_TOKENS)


def cut(token_ids: list[int], eos: set[int]) -> list[int]:
    """Up to the first EOS, included."""
    ends = [i + 1 for i, token in enumerate(token_ids) if token in eos]
    return token_ids[:ends[0]] if ends else token_ids


def two_that_end_something(streams: list[list[int]], others: set[int]) -> tuple[int, int]:
    """Tokens, each of which is the first EOS of some stream, but not as its first token."""
    for pair in itertools.combinations(sorted({token for stream in streams for token in stream[1:]} - others), 2):
        cuts = [cut(stream, others | set(pair)) for stream in streams]
        if set(pair) <= {found[-1] for found in cuts if 1 < len(found) < MAX_TOKENS}:
            return pair
    raise AssertionError("the random model repeats one token")


@pytest.fixture
def two_eos(tmp_path: Path) -> tuple[Path, list[list[int]], tuple[int, int]]:
    """A model whose generation_config names two EOS ids, its greedy streams, and the two."""
    path = write_tiny_llama(tmp_path / "model", vocab_size=258, eos_token_id=None)
    write_byte_tokenizer(path)
    streams = [stream.token_ids for stream in continued(path)]
    pair = two_that_end_something(streams, {1})                    # 1: the tokenizer's </s>
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(pair), "temperature": 0.0}))
    return path, streams, pair


def test_a_model_with_two_eos_ids_stops_at_either(two_eos: tuple[Path, list[list[int]], tuple[int, int]]) -> None:
    path, streams, pair = two_eos
    with LLMEngine(model=str(path), **SETTINGS) as engine:
        stopped = engine.generate(PROMPTS, SamplingParams(max_tokens=MAX_TOKENS))     # temperature 0 is the model's own
        ignoring = engine.generate(PROMPTS, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
    expected = [cut(stream, {1, *pair}) for stream in streams]
    assert [output.outputs[0].token_ids for output in stopped] == expected
    assert set(pair) <= {tokens[-1] for tokens in expected}
    reasons = ["stop" if tokens[-1] in {1, *pair} else "length" for tokens in expected]
    assert [output.outputs[0].finish_reason for output in stopped] == reasons
    assert [output.outputs[0].token_ids for output in ignoring] == streams


def test_the_users_settings_of_threads_end_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Stacks too small for torch, threads that spin for ever: none of it reaches the worker."""
    use_private_cache(monkeypatch, tmp_path / "cache")
    path = write_tiny_llama(tmp_path / "model", vocab_size=258, head_dim=64, hidden_size=256, intermediate_size=1024)
    write_byte_tokenizer(path)
    for name, value in {"OMP_STACKSIZE": "256k", "GOMP_SPINCOUNT": "infinity", "OMP_WAIT_POLICY": "active"}.items():
        monkeypatch.setenv(name, value)
    with LLMEngine(model=str(path), **SETTINGS | {"num_threads": 2, "quantization": "int8"}) as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4] * len(PROMPTS)
    assert capfd.readouterr().err.count("GOMP_SPINCOUNT=infinity OMP_STACKSIZE=256k OMP_WAIT_POLICY=active\n") == 1


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gguf_file_agrees_with_the_same_weights_as_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    use_private_cache(monkeypatch, tmp_path / "cache")
    model = small_model(kind)
    model.save_pretrained(tmp_path / "safetensors")
    expected = [stream.token_ids for stream in continued(tmp_path / "safetensors")]
    path = write_gguf(tmp_path / "small.gguf", model, kind)
    with LLMEngine(model=str(path), **SETTINGS) as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True))
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1
