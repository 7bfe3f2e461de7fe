"""``folovllm.py`` in a user's program: quick, light, and no rival to packages of the same names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Everything of ours that looks types up by the names of modules, long after the import.
USE = """
import pickle
from folovllm import BadRequest, Client, EngineNotRunning, LLMEngine, RequestOutput, SamplingParams
for call, wrong in ((lambda: LLMEngine(window=9), "window: was 9"), (lambda: Client("/nowhere"), "no engine runs at /nowhere"),
                    (lambda: SamplingParams(n=0), "n: was 0")):
    try:
        call()
    except (ValueError, EngineNotRunning) as error:
        assert wrong in str(error), error
    else:
        raise AssertionError(wrong)
assert pickle.loads(pickle.dumps(RequestOutput("1", "a"))) == RequestOutput("1", "a")
assert sys.path == path
"""
THEIRS = "import frontend, frontend.client, protocol.config\nassert (frontend.WHOSE, frontend.client.WHOSE, protocol.config.WHOSE) == (1, 2, 3)\n"


def run(program: str, folder: Path, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", f"import sys; path = list(sys.path)\n{program}"], cwd=folder, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"} | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's own packages, with the names of ours."""
    for name, text in (("frontend/__init__", "WHOSE = 1"), ("frontend/client", "WHOSE = 2"), ("protocol/__init__", ""),
                       ("protocol/config", "WHOSE = 3")):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize("program", [USE + THEIRS, THEIRS + USE, USE + THEIRS + USE, THEIRS + USE + "import importlib, folovllm\n"
                                     "importlib.reload(folovllm)\n" + USE + THEIRS], ids=["ours first", "theirs first", "both", "reloaded"])
def test_beside_packages_of_the_same_names(folder: Path, program: str) -> None:
    run(program, folder)


def test_packages_that_must_not_be_imported_are_not(tmp_path: Path) -> None:
    for name in ("frontend", "protocol"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    run(USE, tmp_path)


def test_without_rivals_the_names_are_what_they_are(tmp_path: Path) -> None:
    program = "import folovllm, frontend.client\nassert folovllm.Client is frontend.client.Client\nprint(folovllm.Client.__module__)"
    assert run(program, tmp_path) == "frontend.client\n"


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    program = "import folovllm\nprint(*sorted({name.split('.')[0] for name in sys.modules}))"
    assert not {"torch", "transformers", "tokenizers", "safetensors", "gguf", "rich", "jinja2"} & set(run(program, tmp_path).split())
