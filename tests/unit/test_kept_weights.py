"""What is said where the worker's weights cannot be made or kept: one sentence that names the place, and what it lacks."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch

from gpu_worker.models import decoder_config, weights
from gpu_worker.models.converted import models_dir
from gpu_worker.models.decoder_parts import weight_bytes
from gpu_worker.models.registry import load_model
from gpu_worker.models.spec import ModelError
from gpu_worker.quantization import modes
from gpu_worker.quantization.modes import MODES
from private_cache import use_private_cache
from tiny_models import write_tiny_llama

CPU = torch.device("cpu")
BOTH_ORDERS = pytest.mark.parametrize("disabled", ["0", "1"], ids=["kernels", "torch"])


def refusal(model_dir: Path, mode: str = "int8") -> str:
    with pytest.raises(ModelError) as caught:
        load_model(model_dir, dtype="bfloat16", device=CPU, quantization=mode, num_threads=1)
    return str(caught.value)


@BOTH_ORDERS
def test_a_full_disk(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, disabled: str) -> None:
    """Simulated by a limit on the size of files."""
    use_private_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("FOLOVLLM_DISABLE_KERNELS", disabled)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        message = refusal(tiny_llama_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    start, end = f"{models_dir()}: File too large; the model's weights take about ", " MB are free; FOLOVLLM_CACHE_DIR names another place"
    assert message.startswith(start) and message.endswith(end)
    assert not [path for path in models_dir().iterdir() if path.is_dir()]


@pytest.mark.parametrize("mode", ["int8", "int4"])
@BOTH_ORDERS
def test_what_they_take_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, disabled: str) -> None:
    use_private_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("FOLOVLLM_DISABLE_KERNELS", disabled)
    model_dir = write_tiny_llama(tmp_path / "model", hidden_size=256, intermediate_size=512)
    load_model(model_dir, dtype="bfloat16", device=CPU, quantization=mode, num_threads=1)
    config = decoder_config.read(weights.read_json(model_dir / "config.json", required=True))
    size = sum(path.stat().st_size for path in models_dir().rglob("*.safetensors"))
    assert weight_bytes(config, MODES[mode].bytes_each, MODES[mode].bytes_each_of_head) == pytest.approx(size, rel=0.05)


def test_a_cache_that_cannot_be_made(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOVLLM_CACHE_DIR", "/proc/nope")
    assert refusal(tiny_llama_dir) == ("/proc/nope: No such file or directory; the model's weights are to be kept in /proc/nope/models;"
                                       " FOLOVLLM_CACHE_DIR names another place")


def test_a_checkpoint_that_cannot_be_read(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another cache directory would not help, and is not spoken of."""
    use_private_cache(monkeypatch, tmp_path / "cache")

    def fails(*_arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(tiny_llama_dir / "model.safetensors"))

    monkeypatch.setattr(modes, "_make", fails)
    assert refusal(tiny_llama_dir) == f"{tiny_llama_dir / 'model.safetensors'}: Input/output error"
