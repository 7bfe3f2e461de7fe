"""GGUF files: the default model's, and small random ones written here."""

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, RopeScalingType
from transformers import AutoModelForCausalLM

from gguf_files import permuted, small_model, write_gguf
from gpu_worker.models.converted import ConversionError
from gpu_worker.models.gguf_checkpoint import convert

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


def llama3_factors(writer) -> None:
    """What llama.cpp's converter writes for LLAMA3, by the definition of the paper's scaling."""
    frequency = 1.0 / 500000.0 ** (np.arange(0, 8, 2) / 8)
    wavelength = 2 * np.pi / frequency
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    factors = np.where(wavelength < 8192 / 4, 1.0, np.where(wavelength > 8192, 8.0, 1 / ((1 - smooth) / 8 + smooth)))
    writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))


def linear_scaling(writer) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize(("kind", "changes", "extra"), [
    ("llama", {"tie_word_embeddings": False}, ()),
    ("llama", {"tie_word_embeddings": True, "attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, ()),
    ("llama", {"attention_bias": True, "mlp_bias": True}, ()),
    ("llama", {"rope_parameters": LLAMA3}, (llama3_factors,)),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, (linear_scaling,)),
    ("llama", {"head_dim": 16}, (lambda w: w.add_key_length(16), lambda w: w.add_value_length(16))),
    ("qwen2", {}, ()),
    ("qwen2", {"vocab_size": 320}, ()),       # more rows than tokens, as Qwen2 has
])
def test_converted_checkpoint_agrees(tmp_path, kind, changes, extra):
    model = small_model(kind, **changes)
    target = tmp_path / "checkpoint"
    target.mkdir()
    convert(write_gguf(tmp_path / "m.gguf", model, kind, extra=extra), target)
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    ids = torch.arange(3, 200)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    config = json.loads((target / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (0, 1, "float32")


@pytest.mark.parametrize(("kind", "changes", "extra"), [
    ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}, (llama3_factors,)),
    ("qwen2", {"tie_word_embeddings": True}, ()),
])
def test_our_decoder_gives_the_bits_of_the_same_weights_as_safetensors(tmp_path, kind, changes, extra):
    from gpu_worker.models.registry import load_model
    from in_process_engine import InProcessEngine

    model, target = small_model(kind, **changes), tmp_path / "converted"
    target.mkdir()
    convert(write_gguf(tmp_path / "m.gguf", model, kind, extra=extra), target)
    model.save_pretrained(tmp_path / "safetensors")
    found = []
    for path in (target, tmp_path / "safetensors"):
        loaded = load_model(path, dtype="float32", device=torch.device("cpu"), num_threads=1)
        assert (loaded.spec.backend, loaded.spec.vocab_size) == ("decoder", 300)
        engine = InProcessEngine(loaded, max_model_len=256, num_blocks=32, max_num_seqs=4, max_num_batched_tokens=48)
        found.append(engine.generate([list(range(3, 3 + length)) for length in (1, 40, 150)], 12))
    for ours, expected in zip(*found, strict=True):
        assert ours.token_ids == expected.token_ids
        assert torch.equal(torch.stack(ours.logits), torch.stack(expected.logits))


@pytest.mark.parametrize(("options", "message"), [
    ({"kind": "gemma"}, "general.architecture: was 'gemma'; allowed: llama, qwen2"),
    ({"tokenizer": "llama"}, "tokenizer.ggml.model: was 'llama'; allowed: 'gpt2'"),
    ({"pre": "tekken"}, "tokenizer.ggml.pre: was 'tekken'; allowed: default, gpt-2, smollm, llama-bpe, qwen2"),
    ({"extra": [lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((2, 2), np.float32))]},
     "tensor blk.0.ffn_gate_inp.weight: this architecture has no place for it"),
    ({"extra": [lambda w: w.add_expert_count(4)]}, "llama.expert_count: was 4"),
    ({"pre": None}, "tokenizer.ggml.pre: was None; allowed: default, gpt-2"),
    ({"tokens": 301}, "tokenizer.ggml.tokens: 301 tokens; allowed: as many as token_embd.weight has rows, 300"),
    ({"extra": [lambda w: w.add_sliding_window(64)]}, "llama.attention.sliding_window: was 64; this setting is not supported"),
    ({"extra": [lambda w: w.add_causal_attention(False)]}, "llama.attention.causal: was False; this setting is not supported"),
    ({"extra": [lambda w: w.add_uint16("split.count", 2)]}, "split.count: was 2; allowed: a model in one file"),
    ({"extra": [lambda w: w.add_value_length(4)]}, "llama.attention.value_length: was 4; allowed: the head size, 8"),
    ({"extra": [lambda w: w.add_key_length(0)]}, "llama.attention.key_length: was 0; allowed: a number above 0"),
    ({"extra": [lambda w: w.add_rope_scaling_type(RopeScalingType.LINEAR)]}, "llama.rope.scaling.factor: was None"),
    ({"extra": [linear_scaling, llama3_factors]}, "llama.rope.scaling.type: was 'linear' beside rope_freqs.weight"),
    ({"extra": [lambda w: w.add_rope_dimension_count(4)]}, "llama.rope.dimension_count: was 4; allowed: the head size, 8"),
    ({"extra": [lambda w: w.add_string("llama.rope.scaling.type", "yarn")]}, "llama.rope.scaling.type: was 'yarn'"),
    ({"extra": [lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 9], np.float32))]}, "rope_freqs.weight: scales"),
])
def test_refused_by_name(tmp_path, options, message):
    kind = options.pop("kind", "llama")
    path = write_gguf(tmp_path / "m.gguf", small_model("llama"), kind, **options)
    with pytest.raises(ConversionError) as caught:
        convert(path, tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"GGUF", b"not a model at all" * 10, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_damaged_file(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="^not a readable GGUF file: "):
        convert(path, tmp_path)


def test_half_and_empty_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", small_model("llama"), "llama")
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 100, 1000):
        path.write_bytes(whole[:size])
        with pytest.raises(ConversionError, match="^not a readable GGUF file: "):
            convert(path, tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ConversionError, match="the file is empty"):
        convert(path, tmp_path)


def test_quantized_matrices_become_bfloat16(tmp_path):
    from gguf import dequantize, quantize

    kind = GGMLQuantizationType.Q8_0
    model = small_model("llama", tie_word_embeddings=True)
    packed = {name: quantize(tensor.numpy(), kind) for name, tensor in model.state_dict().items() if tensor.dim() == 2}
    target = tmp_path / "checkpoint"
    target.mkdir()
    convert(write_gguf(tmp_path / "m.gguf", model, "llama", packed=packed), target)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.dtype == torch.bfloat16
    stored = torch.from_numpy(dequantize(packed["model.embed_tokens.weight"], kind)).bfloat16()
    assert torch.equal(loaded.model.embed_tokens.weight, stored)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight.bfloat16())


def test_half_precision_file_is_kept_as_it_is(tmp_path):
    model = small_model("llama", tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    halves = {name: model.state_dict()[name].numpy().astype(np.float16)}
    target = tmp_path / "checkpoint"
    target.mkdir()
    convert(write_gguf(tmp_path / "m.gguf", model, "llama", packed=halves, packed_type=GGMLQuantizationType.F16), target)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.dtype == torch.float16
    assert np.array_equal(loaded.model.embed_tokens.weight.detach().numpy(), halves[name])


def test_every_token_that_ends_an_answer(tmp_path):
    write_gguf(tmp_path / "m.gguf", small_model("llama"), "llama", extra=[lambda w: w.add_eot_token_id(7)])
    convert(tmp_path / "m.gguf", tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 7]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 1


def test_default_model_is_what_the_file_holds(default_model_dir):
    """One tensor of each kind against gguf's own reader; Q's rows back in order."""
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    tensors = {t.name: t for t in GGUFReader(default_model_dir / "model.gguf").tensors}
    with safe_open(default_model_dir / "model.safetensors", "pt") as opened:
        for gguf, name in (("token_embd.weight", "model.embed_tokens.weight"), ("output_norm.weight", "model.norm.weight"),
                           ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight")):
            stored = torch.from_numpy(np.array(dequantize(tensors[gguf].data, tensors[gguf].tensor_type)))
            assert torch.equal(opened.get_tensor(name), stored.bfloat16()), name
        query = opened.get_tensor("model.layers.3.self_attn.q_proj.weight").float().numpy()
        stored = dequantize(tensors["blk.3.attn_q.weight"].data, tensors["blk.3.attn_q.weight"].tensor_type)
        assert np.array_equal(permuted(query, 9), torch.from_numpy(stored).bfloat16().float().numpy())
