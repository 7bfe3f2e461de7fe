"""A checkpoint directory: its JSON files and its tensors, each of which must be used.

Used by both model backends.  Tensors are mapped from safetensors files, one file or several
with an index; nothing is ever unpickled.  What is missing, or left over, is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpu_worker.models.spec import ModelError
from protocol.cache_dir import cache_dir

logger = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(path: Path, *, required: bool) -> dict[str, Any]:
    """A JSON object; {} for a missing file that is not required."""
    if not path.is_file():
        if required:
            raise ModelError(f"{path}: no such file; a model directory needs it")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: was a {type(content).__name__}; allowed: an object")
    return content


def eos_token_ids(model_dir: Path) -> tuple[int, ...]:
    """Union of what config.json and generation_config.json say, ascending; ModelError for what is no token id."""
    found: set[int] = set()
    for name, required in (("config.json", True), ("generation_config.json", False)):
        value = read_json(model_dir / name, required=required).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and abs(token) < 2**31 for token in ids):
            raise ModelError(f"{model_dir / name}: eos_token_id: was {value!r}; allowed: a token id, or a list of them")
        found.update(ids)
    return tuple(sorted(found))


def tensor_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all of them present."""
    if (model_dir / INDEX).is_file():
        shards = read_json(model_dir / INDEX, required=True).get("weight_map", {})
        files = [model_dir / name for name in sorted(set(shards.values()))]
    else:
        files = [model_dir / SINGLE]
    for path in files:
        if not path.is_file():
            others = sorted(p.name for p in model_dir.glob("*.bin"))
            hint = f" ({', '.join(others)} is not read: only safetensors are)" if others else ""
            raise ModelError(f"{path}: no such file{hint}")
    return files


class Checkpoint:
    """The tensors of a model directory, taken one by one."""

    def __init__(self, model_dir: Path) -> None:
        self._files: dict[str, Any] = {}       # tensor name → open file
        self._left: set[str] = set()
        self._stack = contextlib.ExitStack()
        for path in tensor_files(model_dir):
            try:
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ModelError(f"{path}: not a readable safetensors file: {error}") from None
            for name in opened.keys():
                self._files[name] = opened
                self._left.add(name)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor in ``dtype`` on ``device``; ModelError when missing or of another shape."""
        if name not in self._files:
            raise ModelError(f"tensor {name}: missing in the checkpoint")
        tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"tensor {name}: has shape {list(tensor.shape)}, the config asks for {list(shape)}")
        self._left.discard(name)
        return tensor.to(device=device, dtype=dtype)

    def ignore(self, suffix: str) -> None:
        """Tensors that are computed here and not read."""
        self._left = {name for name in self._left if not name.endswith(suffix)}

    def check_all_taken(self) -> None:
        """ModelError naming tensors that no parameter took."""
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ModelError(f"tensors {', '.join(names[:5])}{more}: in the checkpoint, but the model has no place for them")


def fingerprint(model_dir: Path) -> str:
    """sha256 over config.json and the tensor files of a checkpoint."""
    return files_fingerprint([model_dir / "config.json", *tensor_files(model_dir)])


def files_fingerprint(files: list[Path]) -> str:
    """sha256 over the files' contents; remembered by their identities."""
    stats = [os.stat(path) for path in files]
    identity = [(str(path.resolve()), s.st_ino, s.st_size, s.st_mtime_ns) for path, s in zip(files, stats, strict=True)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    memo = cache_dir() / "fingerprints" / key
    with contextlib.suppress(OSError):
        remembered = memo.read_text(encoding="ascii")
        if len(remembered) == 64:
            return remembered
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    write_atomically(memo, digest.hexdigest())
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Writes a cache file; a directory that cannot be written costs time at the next start, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logger.info("cannot write %s: %s", path, error)
