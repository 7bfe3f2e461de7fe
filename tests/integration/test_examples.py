"""``examples/batch_inference.py`` as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "batch_inference.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(EXAMPLE), *arguments], cwd=folder, text=True, capture_output=True)


def test_own_prompts_in_a_batch_and_one_by_one(tmp_path: Path, default_model_dir: Path) -> None:
    done = run(tmp_path, "--prompts", "What is the capital of France?", "Say hello.", "--max-tokens", "7", "--compare-sequential",
               "--model", str(default_model_dir))
    assert done.returncode == 0, done.stderr
    assert "What is the capital of France? -> The capital of France is Paris." in done.stdout
    figures = r" +\d+\.\d\d s +(\d+) tokens +\d+\.\d tokens/s"
    batch, sequential = (re.search(f"^{name}{figures}$", done.stdout, re.MULTILINE)[1] for name in ("batch", "sequential"))
    assert batch == sequential
    assert re.search(r"^speedup +\d+\.\d\d x  the same tokens$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (("--model", "/nowhere"), 1, "error: the engine could not start: model: was '/nowhere'"),
    (("--num-prompts", "0"), 2, "--num-prompts: was 0; allowed: at least 1"),
    (("--max-tokens", "0"), 2, "--max-tokens: was 0; allowed: at least 1"),
    (("--num-prompts", "2", "--prompts", "a"), 2, "not allowed with argument --num-prompts")])
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (code, "") and says in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_setting_of_the_environment_is_one_sentence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOVLLM_WINDOW", "many")
    done = run(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: FOLOVLLM_WINDOW: was 'many'; allowed: an integer in [1, 2]\n")


def test_help_has_units_and_defaults(tmp_path: Path) -> None:
    flags = " ".join(run(tmp_path, "--help").stdout.split())
    for default in ("(default: 8)", "(default: 64)", "(default: default)"):
        assert default in flags
    assert "tokens" in flags
