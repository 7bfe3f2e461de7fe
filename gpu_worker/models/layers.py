"""The operators of the lean decoder, each with bits that do not depend on the rows beside.

Used by ``decoder.py`` (and ``Linear`` by ``transformers_backend.py``).  On a CPU products run
through oneDNN on weights that it has packed once; that holds for 4 rows and more, which is
why callers pad (``row_buckets.py``).  Element-wise, only functions whose bits do not change
with the place in a buffer are used: single IEEE operations, exp, bfloat16 silu, rms_norm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_worker.models.spec import kind_of
from gpu_worker.product_dtype import onednn_multiplies, product_dtype

_PACK = torch.ops.mkldnn._reorder_linear_weight
_PACKED_PRODUCT = torch.ops.mkldnn._linear_pointwise.default


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN packs the weights of a model of this type here, in whatever type it multiplies them."""
    return onednn_multiplies(product_dtype(dtype, device), device)


class Linear:
    """x [rows, in] → x · weightᵀ + bias [rows, out], in the weight's dtype.

    Where bfloat16 is multiplied as float32 the weight is kept so: twice the bytes.
    """

    __slots__ = ("out_features", "in_features", "input_dtype", "kind", "_inside", "_weight", "_bias", "_packed")
    integers = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.input_dtype = weight.dtype
        self._inside = product_dtype(weight.dtype, weight.device)
        self._packed = packs(weight.dtype, weight.device)
        self.kind = kind_of("float weights", bias)
        weight = weight.to(self._inside)
        self._weight = _PACK(weight.contiguous()) if self._packed else weight
        self._bias = None if bias is None else bias.to(self._inside)

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packed:
            return F.linear(x, self._weight, self._bias)
        return _PACKED_PRODUCT(x.to(self._inside), self._weight, self._bias, "none", [], "").to(self.input_dtype)


class LMHead:
    """Hidden states → float32 logits.

    oneDNN rounds the result of a bfloat16 product to bfloat16, so on a CPU the head's weight
    is kept in float32 (twice the bytes); its products and sums are exact as before.
    """

    __slots__ = ("out_features", "in_features", "input_dtype", "kind", "_weight", "_bias", "_linear")
    integers = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.input_dtype = weight.dtype
        on_cpu = weight.device.type == "cpu"
        self.kind = kind_of("float weights, float32 logits", bias)
        self._linear = Linear(weight.float(), None if bias is None else bias.float()) if on_cpu else None
        self._weight = None if on_cpu else weight
        self._bias = bias

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._linear is not None:
            return self._linear(hidden.float())
        if hidden.dtype == torch.float32:
            logits = torch.mm(hidden, self._weight.t())
        else:
            logits = torch.mm(hidden, self._weight.t(), out_dtype=torch.float32)
        return logits if self._bias is None else logits + self._bias.float()


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """[rows, 2 * n], gate then up → silu(gate) * up [rows, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate_up.dtype == torch.bfloat16 or not gate_up.is_cpu:
        return F.silu(gate).mul_(up)
    return (gate / (1 + torch.exp(-gate))).mul_(up)     # torch's float32 silu differs in vector tails


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: x [rows, heads, head_dim], cos and sin float32 [rows, 1, head_dim // 2]."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    out_first, out_second = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).sub_(second * sin)
    torch.mul(second, cos, out=out_second).add_(first * sin)
    return rotated.to(x.dtype)
