"""A cache directory of a test's own, but for the compiled kernels: these take long and are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.cache_dir import cache_dir


def use_private_cache(patch: pytest.MonkeyPatch, folder: Path) -> Path:
    """``folder``, named by the environment from now on."""
    kernels = cache_dir() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels").symlink_to(kernels)
    patch.setenv("FOLOVLLM_CACHE_DIR", str(folder))
    return folder
