"""In which arithmetic the products of a model's dtype run on this machine.

Used by the layers and by the reference attention.  Without bfloat16 instructions torch
multiplies bfloat16 matrices hundreds of times slower than float32 ones, so there they are
multiplied as float32: the same exact inputs, a float32 sum, the result rounded once.
"""

from __future__ import annotations

import torch


def onednn_multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has fast products of this type here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that weights are kept in and inputs are multiplied in."""
    as_float32 = dtype == torch.bfloat16 and device.type == "cpu" and not onednn_multiplies(dtype, device)
    return torch.float32 if as_float32 else dtype
