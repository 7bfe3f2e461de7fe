"""What becomes of a model under ``--quantization int8``.

Called by ``modes.py``.  The residual stream is rotated (``rotation.py``); every product has int8
weights with a scale for each output, and takes int8 inputs with a scale for each row, but for
down_proj, whose inputs no rotation reaches: they have a scale for each 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.models.decoder_config import DecoderConfig
from gpu_worker.models.decoder_parts import PROJECTIONS, read_layer, read_top
from gpu_worker.models.weights import Checkpoint
from gpu_worker.quantization.channels import ChannelWeight
from gpu_worker.quantization.rotation import RotatedModel
from gpu_worker.quantization.rows import GROUP
from gpu_worker.quantization.tensor_files import TOP, layer_name, linear_tensors, norm_tensors, top_tensors

VERSION = 1                                          # of what is made here
GROUPS = {"down": GROUP}                             # products whose rows have a scale for each so many inputs
CPU = torch.device("cpu")


def tensors(checkpoint: Checkpoint, config: DecoderConfig, _model_dir: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(file, its tensors): the ends of the model, then each layer."""
    rotated = RotatedModel(config.hidden_size)
    top = rotated.top(read_top(checkpoint, config, torch.float32, CPU))
    yield TOP, top_tensors(top) | linear_tensors("head", ChannelWeight.from_float(top.head))
    for index in range(config.num_layers):
        layer = rotated.layer(read_layer(checkpoint, config, index, torch.float32, CPU))
        found = norm_tensors(layer)
        for name in PROJECTIONS:
            affine = getattr(layer, name)
            found |= linear_tensors(name, ChannelWeight.from_float(affine.weight), affine.bias)
        yield layer_name(index), found
