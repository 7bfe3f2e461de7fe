"""Where this user's cached files stand: converted models, compiled kernels, fingerprints.

Used by every process and by the children that fetch models; imports nothing that takes time.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$FOLOVLLM_CACHE_DIR, else $XDG_CACHE_HOME/folovllm, else ~/.cache/folovllm."""
    chosen = os.environ.get("FOLOVLLM_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "folovllm"
