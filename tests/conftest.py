"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(TESTS.parent), str(TESTS)) if path not in sys.path]


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers: 257 tokens, 128 positions, EOS 2."""
    from tiny_models import write_tiny_llama    # imports torch: only where a test needs it

    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The default model, fetched and converted at the first use on this machine."""
    done = subprocess.run([sys.executable, "-P", "-m", "gpu_worker.models.default_model"], check=True, text=True,
                          stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(TESTS.parent)})
    return Path(done.stdout.splitlines()[-1])
