"""A worker from its settings: what it holds, what it says of itself, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.models.spec import ModelError
from gpu_worker.picking import TorchPicker
from gpu_worker.startup import NO_ROW_PADDING, LoadedWorker, load_worker
from protocol.config import EngineConfig, ModelConfig, SchedulerConfig
from tiny_models import write_tiny_llama


def load(model_dir: Path, scheduler: SchedulerConfig = SchedulerConfig(max_num_seqs=3), **model: object) -> LoadedWorker:
    settings = ModelConfig(**({"dtype": "float32", "device": "cpu", "num_threads": 1} | model))
    return load_worker(EngineConfig(model=settings, scheduler=scheduler, model_dir=str(model_dir)))


def test_the_default_path_does_without_transformers(default_model_dir: Path) -> None:
    """Its import alone takes longer than a start may."""
    script = ("import sys; from gpu_worker import process; from gpu_worker.startup import load_worker; from protocol.config import EngineConfig; "
              "worker = load_worker(EngineConfig(model_dir=sys.argv[1])); "
              "print(worker.runner.model.spec.backend, 'torch' in sys.modules, 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", script, str(default_model_dir)], text=True, capture_output=True, check=True,
                          cwd=Path(__file__).resolve().parents[2])
    assert done.stdout.split() == ["decoder", "True", "False"]


def test_tables_and_memory_are_as_large_as_said(tiny_llama_dir: Path) -> None:
    worker = load(tiny_llama_dir, SchedulerConfig(max_num_seqs=3, num_kv_blocks=9), max_model_len=100)
    states = worker.runner.states
    assert (worker.num_blocks, worker.max_model_len, worker.device, worker.dtype, worker.num_threads) == (9, 100, "cpu", "float32", 1)
    assert (states.max_num_seqs, states.max_model_len, states.max_blocks, states.num_blocks) == (3, 100, 4, 9)
    assert worker.runner.kv.layers[1].key.shape == (9, 2, 32, 8)


def test_fewer_blocks_than_the_model_is_long(tiny_llama_dir: Path) -> None:
    worker = load(tiny_llama_dir, SchedulerConfig(max_num_seqs=3, num_kv_blocks=2))
    assert worker.max_model_len == worker.runner.states.max_model_len == 64


@pytest.mark.parametrize(("value", "rows"), [(None, 4), ("1", 1), ("0", 4)])
def test_row_padding_is_switched_off_by_the_environment(
        tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, rows: int) -> None:
    monkeypatch.delenv(NO_ROW_PADDING, raising=False)
    if value is not None:
        monkeypatch.setenv(NO_ROW_PADDING, value)
    assert load(tiny_llama_dir).runner.buckets.bucket(1) == rows


def test_no_quantization_is_the_model_as_it_is(tiny_llama_dir: Path) -> None:
    worker = load(tiny_llama_dir, quantization="none")
    assert worker.dtype == "float32" and worker.numerics_fingerprint == load(tiny_llama_dir).numerics_fingerprint


def test_fingerprint_names_the_numbers(tiny_llama_dir: Path) -> None:
    same = load(tiny_llama_dir).numerics_fingerprint
    assert load(tiny_llama_dir, SchedulerConfig(max_num_seqs=1)).numerics_fingerprint == same
    assert load(tiny_llama_dir, dtype="bfloat16").numerics_fingerprint != same


def test_fingerprint_names_who_draws_tokens(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels do not know heads of 8: with and without them, all else is computed by torch."""
    worker = load(tiny_llama_dir)
    if worker.runner.model.picker.name == TorchPicker.name:
        pytest.skip("there are no kernels here")
    monkeypatch.setenv("FOLOVLLM_DISABLE_KERNELS", "1")
    without = load(tiny_llama_dir)
    assert without.runner.model.picker.name == TorchPicker.name and without.runner.model.attention.name == worker.runner.model.attention.name
    assert without.numerics_fingerprint != worker.numerics_fingerprint


def test_what_it_does_without_is_told_once_all_is_well(tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A refusal stays one sentence."""
    with pytest.raises(ModelError):
        load(tiny_llama_dir, max_model_len=100_000)
    assert not caplog.records
    load(tiny_llama_dir)
    assert "several times slower: heads of 8" in caplog.text


@pytest.mark.parametrize("value", ["</s>", [1, "2"], 1.5, True])
def test_wrong_eos_is_named(tmp_path: Path, value: object) -> None:
    write_tiny_llama(tmp_path, eos_token_id=value)
    with pytest.raises(ModelError, match="config.json: eos_token_id: was .*; allowed: a token id, or a list of them"):
        load(tmp_path)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere.config.json: no such file"):
        load(tmp_path / "nowhere")
