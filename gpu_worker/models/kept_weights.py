"""Weights that the worker makes of a checkpoint, and keeps: where they stand, and what is said when they cannot be made.

Called by ``packed_parts.py`` and ``quantization/modes.py`` at start.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gpu_worker.models.converted import make_once, models_dir
from gpu_worker.models.spec import ModelError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def kept(name: str, make: Callable[[Path], None], num_bytes: int) -> Path:
    """The directory ``name``, checked, or made of about ``num_bytes``; ModelError where it cannot be."""
    try:
        return make_once(name, make, checked=True)
    except OSError as error:
        raise ModelError(_reason(error, num_bytes)) from None


def _reason(error: OSError, num_bytes: int) -> str:
    reason, place = error.strerror or str(error), Path(error.filename or models_dir())
    if error.errno in FULL:
        free = shutil.disk_usage(next(folder for folder in (models_dir(), *models_dir().parents) if folder.exists())).free
        reason = f"{models_dir()}: {reason}; the model's weights take about {num_bytes / 1e6:.0f} MB there, {free / 1e6:.0f} MB are free"
    elif place.is_relative_to(models_dir()) or models_dir().is_relative_to(place):
        reason = f"{place}: {reason}; the model's weights are to be kept in {models_dir()}"
    else:
        return f"{place}: {reason}"       # of the checkpoint itself
    return f"{reason}; FOLOVLLM_CACHE_DIR names another place"


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A file of safetensors; OSError where it cannot be written."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:       # "… (os error 28)"
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
