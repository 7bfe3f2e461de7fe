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
from gpu_worker.models.layers import Linear, LMHead, packs, rotate, silu_and_multiply
from gpu_worker.models.spec import ModelError, ModelSpec
from gpu_worker.models.weights import Checkpoint


class _Loader:
    """Takes the tensors of a checkpoint in the model's dtype, on its device."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint.take(name, shape, self._dtype, self._device)

    def linear(self, prefix: str, names: tuple[str, ...], outputs: tuple[int, ...], inputs: int, *, bias: bool) -> Linear:
        """Projections of the same input as one product."""
        weights = [self.tensor(f"{prefix}.{n}.weight", out, inputs) for n, out in zip(names, outputs, strict=True)]
        biases = [self.tensor(f"{prefix}.{n}.bias", out) for n, out in zip(names, outputs, strict=True)] if bias else None
        return Linear(torch.cat(weights), torch.cat(biases) if biases else None)


class _Layer:
    """One decoder layer."""

    def __init__(self, config: DecoderConfig, index: int, loader: _Loader) -> None:
        prefix, hidden, dim = f"model.layers.{index}", config.hidden_size, config.head_dim
        self._query_size, self._kv_size = config.num_heads * dim, config.num_kv_heads * dim
        self._eps, self._num_heads, self._dim = config.rms_norm_eps, config.num_heads, dim
        self.attention = AttentionLayer(index, config.num_heads, config.num_kv_heads, dim, dim**-0.5, config.windows[index])
        self._input_norm = loader.tensor(f"{prefix}.input_layernorm.weight", hidden)
        self._qkv = loader.linear(f"{prefix}.self_attn", ("q_proj", "k_proj", "v_proj"),
                                  (self._query_size, self._kv_size, self._kv_size), hidden, bias=config.qkv_bias)
        self._query_norm = self._key_norm = None
        if config.qk_norm:
            self._query_norm = loader.tensor(f"{prefix}.self_attn.q_norm.weight", dim)
            self._key_norm = loader.tensor(f"{prefix}.self_attn.k_norm.weight", dim)
        self._output = loader.linear(f"{prefix}.self_attn", ("o_proj",), (hidden,), self._query_size, bias=config.output_bias)
        self._mlp_norm = loader.tensor(f"{prefix}.post_attention_layernorm.weight", hidden)
        self._gate_up = loader.linear(f"{prefix}.mlp", ("gate_proj", "up_proj"), (config.intermediate_size,) * 2, hidden,
                                      bias=config.mlp_bias)
        self._down = loader.linear(f"{prefix}.mlp", ("down_proj",), (hidden,), config.intermediate_size, bias=config.mlp_bias)

    def linears(self) -> list[Linear]:
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

    def __init__(self, config: DecoderConfig, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device,
                 max_model_len: int, eos_token_ids: tuple[int, ...], attention: AttentionBackend,
                 weights_fingerprint: str) -> None:
        self.attention, self.weights_fingerprint = attention, weights_fingerprint
        loader = _Loader(checkpoint, dtype, device)
        self._embedding = loader.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self._layers = [_Layer(config, index, loader) for index in range(config.num_layers)]
        self._norm = loader.tensor("model.norm.weight", config.hidden_size)
        self._eps = config.rms_norm_eps
        self._head = LMHead(self._head_weight(config, checkpoint, loader))
        checkpoint.ignore("rotary_emb.inv_freq")
        checkpoint.check_all_taken()
        angles = torch.arange(max_model_len).float()[:, None] * inverse_frequencies(config)
        self._cos, self._sin = (table.unsqueeze(1).to(device) for table in (angles.cos(), angles.sin()))
        self.spec = ModelSpec(
            name=config.family, backend="decoder", layers=tuple(layer.attention for layer in self._layers),
            hidden_size=config.hidden_size, vocab_size=config.vocab_size, max_model_len=config.max_position, dtype=dtype,
            eos_token_ids=eos_token_ids, supports_bit_exact=packs(dtype, device))

    def _head_weight(self, config: DecoderConfig, checkpoint: Checkpoint, loader: _Loader) -> Tensor:
        if config.tied_head and "lm_head.weight" not in checkpoint:
            return self._embedding
        weight = loader.tensor("lm_head.weight", config.vocab_size, config.hidden_size)
        if config.tied_head and not torch.equal(weight, self._embedding):
            raise ModelError("tie_word_embeddings: was true, but lm_head.weight differs from model.embed_tokens.weight")
        return weight

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, attn: AttentionMetadata, kv: KVCache) -> Tensor:
        step = self.attention.begin(attn, kv)
        hidden = F.embedding(token_ids, self._embedding)
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        for layer in self._layers:
            hidden = layer(hidden, cos, sin, step)
        return F.rms_norm(hidden, self._norm.shape, self._norm, self._eps)

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def linears(self) -> list[Linear]:
        return [linear for layer in self._layers for linear in layer.linears()]

    def head(self) -> LMHead:
        return self._head
