"""The lean decoder of the Llama family: Llama, Mistral, Qwen2, Qwen3, SmolLM2 and their like.

Loaded by ``registry.py`` when ``decoder_config.read`` accepts the config; run by the worker's
model runner.  One forward takes all tokens of a step, whatever requests they belong to;
every operator works row by row, and only attention looks at other tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.attention.interface import AttentionBackend, AttentionLayer, AttentionMetadata, StepAttention
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.decoder_config import DecoderConfig, inverse_frequencies
from gpu_worker.models.decoder_parts import DecoderParts, LayerParts
from gpu_worker.models.layers import packs, rotate, silu_and_multiply
from gpu_worker.models.spec import ModelSpec, RowProduct
from gpu_worker.picking import Picker


class _Layer:
    """One decoder layer."""

    def __init__(self, config: DecoderConfig, index: int, parts: LayerParts) -> None:
        dim = config.head_dim
        self._eps, self._num_heads, self._dim = config.rms_norm_eps, config.num_heads, dim
        self.attention = AttentionLayer(index, config.num_heads, config.num_kv_heads, dim, dim**-0.5, config.windows[index])
        self._input_norm, self._mlp_norm = parts.input_norm, parts.mlp_norm
        self._query_norm, self._key_norm = parts.query_norm, parts.key_norm
        self._qkv, self._output, self._gate_up, self._down = parts.qkv, parts.output, parts.gate_up, parts.down

    def linears(self) -> list[RowProduct]:
        return [self._qkv, self._output, self._gate_up, self._down]

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, step: StepAttention) -> Tensor:
        """hidden [num_padded_tokens, hidden_size], cos and sin [num_padded_tokens, 1, head_dim // 2]."""
        qkv = self._qkv(F.rms_norm(hidden, self._input_norm.shape, self._input_norm, self._eps))
        heads = qkv.view(qkv.shape[0], -1, self._dim)      # query heads, key heads, value heads
        num_kv_heads = self.attention.num_kv_heads
        query_key, value = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
        if self._query_norm is not None:
            query_key = torch.cat((F.rms_norm(query_key[:, :self._num_heads], (self._dim,), self._query_norm, self._eps),
                                   F.rms_norm(query_key[:, self._num_heads:], (self._dim,), self._key_norm, self._eps)), dim=1)
        rotated = rotate(query_key, cos, sin)
        attended = step.attend(self.attention, rotated[:, :self._num_heads], rotated[:, self._num_heads:], value)
        hidden = hidden + self._output(attended)
        gate_up = self._gate_up(F.rms_norm(hidden, self._mlp_norm.shape, self._mlp_norm, self._eps))
        return hidden + self._down(silu_and_multiply(gate_up))


class Decoder:
    """The whole model: embedding, layers, final norm, head."""

    pads_rows = True
    slower_because: str | None = None

    def __init__(self, config: DecoderConfig, parts: DecoderParts, *, device: torch.device, max_model_len: int,
                 eos_token_ids: tuple[int, ...], attention: AttentionBackend, picker: Picker, kv_dtype: torch.dtype | None = None) -> None:
        self.attention, self.picker, self.weights_fingerprint = attention, picker, parts.fingerprint
        top = parts.top()
        self._embedding, self._norm, self._head, self._eps = top.embedding, top.norm, top.head, config.rms_norm_eps
        self._layers = [_Layer(config, index, parts.layer(index)) for index in range(config.num_layers)]
        angles = torch.arange(max_model_len).float()[:, None] * inverse_frequencies(config)
        self._cos, self._sin = (table.unsqueeze(1).to(device) for table in (angles.cos(), angles.sin()))
        self.spec = ModelSpec(
            name=config.family, backend="decoder", layers=tuple(layer.attention for layer in self._layers),
            hidden_size=config.hidden_size, vocab_size=config.vocab_size, max_model_len=config.max_position, dtype=parts.dtype,
            eos_token_ids=eos_token_ids, supports_bit_exact=packs(parts.dtype, device), quantization=parts.quantization,
            other_kv_dtype=kv_dtype or parts.kv_dtype)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, attn: AttentionMetadata, kv: KVCache) -> Tensor:
        step = self.attention.begin(attn, kv)
        hidden = F.embedding(token_ids, self._embedding).to(self.spec.dtype)
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        for layer in self._layers:
            hidden = layer(hidden, cos, sin, step)
        return F.rms_norm(hidden, self._norm.shape, self._norm, self._eps)

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def linears(self) -> list[RowProduct]:
        return [linear for layer in self._layers for linear in layer.linears()]

    def head(self) -> RowProduct:
        return self._head
