"""Our paged attention under the interface that ``transformers`` calls.

``register`` makes it known there by name; the step it belongs to arrives as a keyword
argument that models hand through their forward, never by module state.  What a model asks
for and the backends lack is refused by name: no argument is ignored.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from gpu_worker.attention.interface import AttentionLayer, StepAttention
from gpu_worker.models.spec import ModelError

NAME = "folovllm_paged"
STEP_ARGUMENT = "folovllm_step"
NEUTRAL_ARGUMENTS = frozenset(("position_ids", "use_cache", "return_dict", "cache_position", "layer_idx", "position_embeddings",
                               "dropout", "deterministic", "is_causal", "past_key_values"))


class ModelStep(Protocol):
    """One forward of a transformers model, as its layers see it."""

    def attend(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...


class CountedStep:
    """Attention of one step that knows which layers have called it."""

    def __init__(self, step: StepAttention) -> None:
        self._step = step
        self.calls: list[int] = []

    def attend(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.calls.append(layer.index)
        return self._step.attend(layer, query, key, value)


class RecordingStep:
    """Attends to nothing: notes what the layers ask for, at load."""

    def __init__(self) -> None:
        self.layers: list[AttentionLayer] = []

    def attend(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.layers.append(layer)
        return query.reshape(query.shape[0], -1)


def register() -> None:
    """Makes the attention known to transformers; registering again changes nothing."""
    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, no_mask)


def no_mask(*_arguments: Any, **_keywords: Any) -> None:
    """Which keys a token sees, the paged attention knows by itself."""
    return None


def paged_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
                    folovllm_step: ModelStep | None = None, **keywords: Any) -> tuple[Tensor, None]:
    """query [1, num_heads, num_tokens, head_dim] → [1, num_tokens, num_heads, head_dim]."""
    kind = type(module).__name__
    if folovllm_step is None:
        raise ModelError(f"{kind}: does not hand keyword arguments through to its attention")
    if attention_mask is not None:
        raise ModelError(f"{kind}: gives its attention a mask of its own, which paged attention lacks")
    if keywords.get("is_causal", True) is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{kind}: asks for attention that is not causal")
    for name, argument in keywords.items():
        if name not in NEUTRAL_ARGUMENTS and argument is not None and argument is not False:
            raise ModelError(f"{kind}: asks its attention for {name}, which paged attention lacks")
    if value.shape[-1] != query.shape[-1]:
        raise ModelError(f"{kind}: has values of another size than its keys, which paged attention lacks")
    if not isinstance(getattr(module, "layer_idx", None), int):
        raise ModelError(f"{kind}: has no layer_idx")
    _batch, num_heads, num_tokens, head_dim = query.shape
    layer = AttentionLayer(module.layer_idx, num_heads, key.shape[1], head_dim,
                           head_dim**-0.5 if scaling is None else float(scaling), sliding_window, softcap)
    output = folovllm_step.attend(layer, *(tensor[0].transpose(0, 1) for tensor in (query, key, value)))
    return output.view(1, num_tokens, num_heads, head_dim), None


class recorded_masks:
    """Within it, ``functions`` collects the mask functions that a model asks for."""

    def __init__(self) -> None:
        self.functions: list[Any] = []

    def __enter__(self) -> recorded_masks:
        AttentionMaskInterface.register(NAME, self._record)
        return self

    def __exit__(self, *_exception: object) -> None:
        AttentionMaskInterface.register(NAME, no_mask)

    def _record(self, *_arguments: Any, mask_function: Any = None, **_keywords: Any) -> None:
        if mask_function is not None:
            self.functions.append(mask_function)


def window_of_mask(mask_function: Any, reach: int) -> int | None:
    """The sliding window (tokens) of a mask function, None for all before; ModelError if it is neither.

    Looked at for a query at position ``reach``, which must lie beyond every window.
    """
    zero, keys = torch.tensor(0), torch.arange(reach + 2)
    seen = torch.as_tensor(mask_function(zero, zero, torch.tensor(reach), keys)).expand(reach + 2)
    count = int(seen.sum())
    if seen[reach + 1] or not bool(seen[reach + 1 - count:reach + 1].all()):
        raise ModelError("the model asks for a mask that is neither causal nor a sliding window")
    return None if count == reach + 1 else count
