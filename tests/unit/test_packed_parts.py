"""Weights on disk in the kernels' order: the same bits as packed at load, made once, never taken for what they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from gpu_worker.kernels import panels
from gpu_worker.kernels.linear import Weight, WeightKind
from gpu_worker.models import manifest, packed_files, packed_parts
from gpu_worker.models.converted import make_once, models_dir
from gpu_worker.models.kernel_decoder import KernelDecoder
from gpu_worker.models.registry import load_model
from gpu_worker.models.spec import LoadedModel, ModelError
from private_cache import use_private_cache
from tiny_models import write_random_model
from whole_prompt import logits_of

CPU = torch.device("cpu")
IDS = [(29 * i) % 250 + 3 for i in range(70)]
MODES = pytest.mark.parametrize("mode", [None, "int8", "int4"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of its own for each test."""
    return use_private_cache(monkeypatch, tmp_path / "cache")


def biased(path: Path, seed: int = 0) -> Path:
    from transformers import Qwen3Config

    return write_random_model(path, Qwen3Config(
        vocab_size=261, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=128, initializer_range=0.1, attention_bias=True), seed=seed)


def converted(seed: int = 0) -> Path:
    """A checkpoint that stands where conversions do."""
    return make_once(f"model-{seed}", lambda target: biased(target, seed))


def load(model_dir: Path, mode: str | None = None) -> LoadedModel:
    model = load_model(model_dir, dtype="bfloat16", device=CPU, quantization=mode, num_threads=1)
    assert isinstance(model, KernelDecoder)
    return model


def packed_folders() -> list[Path]:
    return sorted(models_dir().glob(f"*-{panels.LAYOUT}"))


def test_the_same_bits_as_packed_at_load(tmp_path: Path) -> None:
    kept, at_load = load(converted()), load(biased(tmp_path / "own"))
    assert torch.equal(logits_of(kept, IDS), logits_of(at_load, IDS))
    assert kept.spec == at_load.spec and kept.weights_fingerprint == at_load.weights_fingerprint
    assert len(packed_folders()) == 1


@MODES
def test_made_once_and_only_copied_after_that(monkeypatch: pytest.MonkeyPatch, mode: str | None) -> None:
    first = load(converted(), mode)

    def again(*_arguments: object) -> None:
        raise AssertionError("packed twice")

    for name in ("pack_words", "pack_int8", "pack_int8_blocks", "pack_int4_blocks"):
        monkeypatch.setattr(panels, name, again)
    second = load(converted(), mode)
    assert second.weights_fingerprint == first.weights_fingerprint
    assert torch.equal(logits_of(second, IDS), logits_of(first, IDS))
    for product in (*second.linears(), second.head()):
        assert product.structure().weight.panels % 64 == 0


@MODES
def test_another_layout_is_made_anew(monkeypatch: pytest.MonkeyPatch, mode: str | None) -> None:
    expected = logits_of(load(converted(), mode), IDS)
    monkeypatch.setattr(panels, "LAYOUT", "panels0")
    assert not packed_folders()
    assert torch.equal(logits_of(load(converted(), mode), IDS), expected)
    assert len(packed_folders()) == 1


def test_another_checkpoint_is_packed_anew() -> None:
    models = [load(converted(seed)) for seed in (0, 1)]
    assert models[0].weights_fingerprint != models[1].weights_fingerprint and len(packed_folders()) == 2


def flip(path: Path, at: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


def rename_tensor(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize(("damage", "told"), [
    (lambda path: flip(path, -1000), "layer.1.safetensors is damaged: its bytes are not those that were written"),
    (lambda path: rename_tensor(path, b"down.panels", b"down.panelz"), "layer.1.safetensors is damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:-64] + bytes(64)), "layer.1.safetensors is damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:-64]), "layer.1.safetensors has "),
    (lambda path: path.write_bytes(b""), "layer.1.safetensors has 0 bytes, of "),
    (Path.unlink, "layer.1.safetensors is missing"),
    (lambda path: (path.parent / manifest.NAME).unlink(), "manifest.json is missing"),
    (lambda path: (path.parent / manifest.NAME).write_bytes(b'["'), "manifest.json is damaged"),
    (lambda path: (path.parent / manifest.NAME).write_bytes(b'{"top.safetensors": 3}'), "manifest.json is damaged"),
])
@pytest.mark.parametrize("mode", [None, "int8"])
def test_what_is_damaged_is_made_anew(caplog: pytest.LogCaptureFixture, mode: str | None, damage, told: str) -> None:
    first = load(converted(), mode)
    expected, folder = logits_of(first, IDS), packed_folders()[0]
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / "layer.1.safetensors")
    caplog.clear()
    again = load(converted(), mode)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"][0].startswith(f"{folder}: {told}")
    assert torch.equal(logits_of(again, IDS), expected) and again.weights_fingerprint == first.weights_fingerprint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert not list(models_dir().glob(".making-*"))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_weights_for_plain_torch_are_compared_too(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                                  mode: str) -> None:
    monkeypatch.setenv("FOLOVLLM_DISABLE_KERNELS", "1")
    def plain() -> torch.Tensor:
        return logits_of(load_model(tiny_llama_dir, dtype="bfloat16", device=CPU, quantization=mode, num_threads=1), IDS)

    expected = plain()
    flip(next(models_dir().glob(f"{mode}-*")) / "top.safetensors", -1)
    assert torch.equal(plain(), expected)
    assert "top.safetensors is damaged" in caplog.text


def test_a_file_of_another_layout_is_refused() -> None:
    load(converted())
    folder = packed_folders()[0]
    path = folder / "layer.1.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {packed_files.LAYOUT_KEY: "panels0"})
    manifest.write(folder)
    with pytest.raises(ModelError, match=f"layer.1.safetensors: its layout is panels0, not {panels.LAYOUT}; when {folder} is removed"):
        load(converted())


@pytest.mark.parametrize("size", [6, -64])
def test_half_a_file_is_refused(size: int) -> None:
    """Whatever its manifest says."""
    load(converted())
    path = packed_folders()[0] / "layer.0.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    manifest.write(path.parent)
    with pytest.raises(ModelError, match=r"layer.0.safetensors: .* header.*; when .* is removed, it is made anew"):
        load(converted())


def changed(name: str, change) -> str:
    """What is said of ``layer.1`` or ``top`` when its tensors are others than the config's, by a manifest that does not tell."""
    load(converted(), "int8")
    path = packed_folders()[0] / f"{name}.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors | change(tensors), path, {packed_files.LAYOUT_KEY: panels.LAYOUT})
    manifest.write(path.parent)
    with pytest.raises(ModelError) as caught:
        load(converted(), "int8")
    message, hint = str(caught.value), f"; when {path.parent} is removed, it is made anew"
    assert message.startswith(f"{path}: ") and message.endswith(hint)
    return message[len(f"{path}: "):-len(hint)]


def product(name: str, weight: Weight) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in weight.tensors().items()}


@pytest.mark.parametrize(("name", "change", "told"), [
    ("layer.1", lambda _: product("down", Weight.from_float(WeightKind.INT8, torch.ones(96, 192))),
     "down: was 192 inputs and 96 outputs; the config asks for 160 and 96"),
    ("layer.1", lambda _: product("qkv", Weight.from_float(WeightKind.INT8, torch.ones(96, 96), torch.ones(96))),
     "qkv: was 96 inputs and 96 outputs; the config asks for 96 and 160"),
    ("layer.1", lambda _: {"down.header": torch.tensor([2, 96, 32768, 32768])}, "down: panels: was uint8 [6, 2560]; allowed: uint8"),
    ("layer.1", lambda _: {"down.header": torch.tensor([9, 96, 160, 160])}, "down: 9 is not a valid WeightKind"),
    ("layer.1", lambda tensors: {"down.scales": tensors["down.scales"].view(torch.int32)}, "down.scales: its type is I32"),
    ("layer.1", lambda _: {"input_norm": torch.ones(80)}, "input_norm: was float32 [80]; the config asks for float32 [96]"),
    ("layer.1", lambda _: {"query_norm": torch.ones(96)}, "query_norm: was float32 [96]; the config asks for float32 [16]"),
    ("top", lambda _: {"embedding": torch.ones(200, 96).bfloat16()},
     "embedding: was bfloat16 [200, 96]; the config asks for bfloat16 [261, 96]"),
    ("top", lambda _: {"norm": torch.ones(80)}, "norm: was float32 [80]; the config asks for float32 [96]"),
    ("top", lambda _: product("head", Weight.from_float(WeightKind.INT8, torch.ones(261, 64))), "head: was 64 inputs and 261 outputs"),
])
def test_weights_of_another_model_are_refused(name: str, change, told: str) -> None:
    assert changed(name, change).startswith(told)


@pytest.mark.parametrize("gone", ["input_norm", "query_norm", "down.header", "down.panels", "down.scales"])
def test_a_tensor_that_is_missing_is_named(gone: str) -> None:
    load(converted(), "int8")
    path = packed_folders()[0] / "layer.1.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors[gone]
    safetensors.torch.save_file(tensors, path, {packed_files.LAYOUT_KEY: panels.LAYOUT})
    manifest.write(path.parent)
    with pytest.raises(ModelError, match=f"layer.1.safetensors: .*{gone.rpartition('.')[2]}.*; when .* is removed, it is made anew"):
        load(converted(), "int8")


def test_no_copy_of_what_the_user_keeps(tmp_path: Path) -> None:
    """Nor of a dtype that the checkpoint is not meant for."""
    load(biased(tmp_path / "own"))
    load_model(converted(), dtype="float32", device=CPU, num_threads=1)
    assert not packed_folders()
    assert packed_parts.keeps_packed(converted(), torch.bfloat16) and not packed_parts.keeps_packed(converted(), torch.float32)
