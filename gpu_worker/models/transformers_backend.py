"""Every architecture beyond our own decoder, through ``transformers`` with our paged attention.

Loaded by ``registry.py``.  The model's own code runs on one row of all tokens of the step;
its linears are packed like ours, its head runs apart, on the rows that sample, in float32.
At load it has to prove itself: attention called exactly once a layer, the masks that it asks
for equal to the windows that it gives, and a probe in chunks equal to its own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

from gpu_worker.attention import transformers_bridge as bridge
from gpu_worker.attention.interface import AttentionBackend, AttentionLayer, AttentionMetadata
from gpu_worker.kv_cache import KVCache
from gpu_worker.models import weights
from gpu_worker.models.layers import Linear, LMHead
from gpu_worker.models.spec import ModelError, ModelSpec
from gpu_worker.picking import Picker
from protocol.codec import BLOCK_SIZE_TOKENS

PROBE_CHUNKS = (13, 11)          # tokens: a prompt in two steps, beside another one
PROBE_OTHER = 8
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")   # their frequencies change with the longest position of the batch


class _PackedLinear(nn.Module):
    """An nn.Linear whose weight is packed; ``weight`` is left as a shape without memory."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.empty_like(linear.weight, device="meta")
        self.product = Linear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class _Head(nn.Module):
    """The model's head with float32 logits; [1, rows, hidden_size] → [1, rows, vocab_size]."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.product = LMHead(head.weight.detach(), None if head.bias is None else head.bias.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        return self.product(hidden[0])[None]


@dataclass
class _GivenOutput(ModelOutput):
    """What causal models read of their base model's output."""

    last_hidden_state: Tensor | None = None
    past_key_values: None = None
    hidden_states: None = None
    attentions: None = None
    cross_attentions: None = None       # GPT-2 and its like
    router_logits: None = None          # mixtures of experts


class _GivenHidden(nn.Module):
    """Stands for the base model when only the head runs: its output is what it is given."""

    @property
    def decoder(self) -> _GivenHidden:
        return self

    def forward(self, *_arguments: Any, inputs_embeds: Tensor, **_keywords: Any) -> _GivenOutput:
        return _GivenOutput(last_hidden_state=inputs_embeds)


class TransformersModel:
    """A transformers model that runs on paged K/V."""

    pads_rows = True
    slower_because: str | None = None

    def __init__(self, base: nn.Module, head: nn.Module, spec: ModelSpec, attention: AttentionBackend, picker: Picker,
                 weights_fingerprint: str) -> None:
        self.spec, self.attention, self.picker, self.weights_fingerprint = spec, attention, picker, weights_fingerprint
        self._base = base
        self._head = head            # the whole causal model, its base replaced by _GivenHidden
        self._once_each = list(range(spec.num_layers))

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, attn: AttentionMetadata, kv: KVCache) -> Tensor:
        step = bridge.CountedStep(self.attention.begin(attn, kv))
        hidden = _run_base(self._base, token_ids, positions, step)
        if step.calls != self._once_each:
            raise ModelError(f"{self.spec.name}: called attention for layers {step.calls}, not once for each")
        return hidden

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head(input_ids=None, inputs_embeds=hidden[None], use_cache=False).logits[0]

    def linears(self) -> list[Linear]:
        return [module.product for module in self._base.modules() if isinstance(module, _PackedLinear)]

    def head(self) -> LMHead:
        return next(module.product for module in self._head.modules() if isinstance(module, _Head))


def load_transformers_model(model_dir: Path, *, dtype: torch.dtype, device: torch.device, max_model_len: int | None,
                            eos_token_ids: tuple[int, ...], attention: Callable[[tuple[AttentionLayer, ...], torch.dtype], tuple[AttentionBackend, str | None]],
                            picker: Picker, kv_dtype: torch.dtype | None = None) -> TransformersModel:
    """The model, proven by a probe; ModelError names what it lacks.  ``attention`` chooses the backend for its layers."""
    bridge.register()
    config = _read_config(model_dir)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise ModelError(f"config.json: max_position_embeddings: not given by {config.model_type}")
    if max_model_len is not None and max_model_len > limit:
        raise ModelError(f"max_model_len: was {max_model_len}; allowed: up to the model's own {limit}")
    fingerprint = weights.fingerprint(model_dir)
    model = _load(model_dir, config, dtype, device)
    layers = _record_layers(model, config, device)
    probe_ids = torch.arange(7, 7 + sum(PROBE_CHUNKS), device=device) % config.vocab_size
    expected = _own_logits(model, probe_ids)
    base, head = _split(model)
    experts = any((getattr(config, name, None) or 0) > 1 for name in EXPERT_FIELDS)
    spec = ModelSpec(
        name=config.model_type, backend="transformers", layers=layers, hidden_size=config.hidden_size,
        vocab_size=expected.shape[-1], max_model_len=limit, dtype=dtype, eos_token_ids=eos_token_ids,
        other_kv_dtype=kv_dtype, supports_bit_exact=device.type == "cpu" and dtype != torch.float16 and not experts)
    backend, lacking = attention(layers, dtype)
    loaded = TransformersModel(base, head, spec, backend, picker, fingerprint)
    loaded.slower_because = lacking
    _check_probe(loaded, probe_ids, expected)
    return loaded


def _read_config(model_dir: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{model_dir / 'config.json'}: {_first_line(error)}") from None
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise ModelError(f"model_type {config.model_type}: only models of text alone, without encoder, are supported")
    for rope_type in _rope_types(getattr(config, "rope_parameters", None)):
        if rope_type in BATCH_DEPENDENT_ROPE:
            raise ModelError(f"rope_type {rope_type}: not supported, a request's output would depend on its neighbours")
    return config


def _rope_types(parameters: Any) -> list[str]:
    if not isinstance(parameters, dict):
        return []
    nested = [kind for value in parameters.values() for kind in _rope_types(value)]
    return nested + ([parameters["rope_type"]] if "rope_type" in parameters else [])


def _load(model_dir: Path, config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            model_dir, config=config, dtype=dtype, attn_implementation=bridge.NAME, local_files_only=True,
            use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except KeyError as error:
        if error.args != (bridge.NAME,):
            raise ModelError(f"model_type {config.model_type}: KeyError: {_first_line(error)}") from None
        raise ModelError(f"model_type {config.model_type}: does not support paged attention (it has only attention of its own)") from None
    except (ValueError, OSError, RuntimeError) as error:
        raise ModelError(f"model_type {config.model_type}: {_first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(fault):
            raise ModelError(f"model_type {config.model_type}: {fault.replace('_', ' ')} in the checkpoint: {sorted(report[fault])[:5]}")
    return model.eval().to(device)


def _record_layers(model: nn.Module, config: Any, device: torch.device) -> tuple[AttentionLayer, ...]:
    """What each layer asks of attention; refuses a model that does not ask exactly once a layer."""
    step, tokens = bridge.RecordingStep(), torch.arange(4, device=device)
    with bridge.recorded_masks() as masks, torch.inference_mode(), _foreign_code(config.model_type):
        _run_base(model.base_model, tokens, tokens, step)
    if [layer.index for layer in step.layers] != list(range(config.num_hidden_layers)):
        raise ModelError(f"model_type {config.model_type}: does not support paged attention (it must be called once in each of "
                         f"{config.num_hidden_layers} layers, and was for {[layer.index for layer in step.layers]})")
    windows = {layer.window for layer in step.layers}
    reach = max(window or 0 for window in windows | {getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)})
    asked = {bridge.window_of_mask(function, reach + 64) for function in masks.functions}
    if not asked <= windows | {None} or (asked and not windows - {None} <= asked):
        raise ModelError(f"model_type {config.model_type}: asks for masks of windows {asked}, but its attention for {windows}")
    return tuple(step.layers)


@contextlib.contextmanager
def _foreign_code(model_type: str) -> Iterator[None]:
    """What a model's own code cannot do, as one sentence that names the model."""
    try:
        yield
    except ModelError:
        raise
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise ModelError(f"model_type {model_type}: cannot run on paged attention: {_first_line(error)}") from None


def _own_logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    """float32 [num_tokens, vocab_size] by the model's own attention."""
    try:
        model.set_attn_implementation("eager")
        with torch.inference_mode(), _foreign_code(model.config.model_type):
            return model(input_ids=token_ids[None], use_cache=False).logits[0].float()
    finally:
        model.set_attn_implementation(bridge.NAME)


def _split(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(base model, the causal model around a stand-in for it), with packed linears and a float32 head."""
    base, head = model.base_model, model.get_output_embeddings()
    if base is model or type(head) is not nn.Linear:
        raise ModelError(f"model_type {model.config.model_type}: its head cannot be run apart")
    model.set_output_embeddings(_Head(head))
    setattr(model, model.base_model_prefix, _GivenHidden())
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, _PackedLinear(child))
    return base, model


def _run_base(base: nn.Module, token_ids: Tensor, positions: Tensor, step: bridge.ModelStep) -> Tensor:
    keywords = {bridge.STEP_ARGUMENT: step}
    output = base(input_ids=token_ids[None], position_ids=positions[None], attention_mask=None, use_cache=False, **keywords)
    return output.last_hidden_state[0]


def _check_probe(model: TransformersModel, token_ids: Tensor, expected: Tensor) -> None:
    """Two chunks of one prompt, each beside another request, against the model's own forward."""
    device, other = token_ids.device, token_ids[:PROBE_OTHER]
    kv = KVCache(model.spec, 2, model.spec.dtype, device)
    logits, begin = [], 0
    for count in PROBE_CHUNKS:
        tokens = torch.cat((token_ids[begin:begin + count], other))
        positions = torch.cat((torch.arange(begin, begin + count), torch.arange(PROBE_OTHER))).to(device)
        slots = positions + torch.tensor([0] * count + [BLOCK_SIZE_TOKENS] * PROBE_OTHER, device=device)
        queries, lens = np.array([count, PROBE_OTHER], np.int32), np.array([begin + count, PROBE_OTHER], np.int32)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, count, count + PROBE_OTHER], dtype=torch.int32, device=device),
            seq_lens=torch.from_numpy(lens).to(device), block_table=torch.tensor([[0], [1]], dtype=torch.int32, device=device),
            slot_mapping=slots, query_lens_host=queries, seq_lens_host=lens, num_tokens=len(tokens))
        with _foreign_code(model.spec.name):
            logits.append(model.compute_logits(model.forward(tokens, positions, metadata, kv))[:count])
        begin += count
    difference = float((torch.cat(logits) - expected).abs().mean() / expected.std())
    allowed = 1e-3 if model.spec.dtype == torch.float32 else 0.1
    if not difference <= allowed:
        raise ModelError(f"model_type {model.spec.name}: differs from its own forward by {difference:.2g} standard deviations "
                         f"on paged attention; allowed: {allowed}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
