"""``python launch.py`` where the machine, the disk or the settings are not as they should be: one sentence, nothing left."""

from __future__ import annotations

import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import launch
from frontend.status import process_state
from protocol.config import EngineConfig
from protocol.progress import ProgressPage
from protocol.run_dir import RunDir
from protocol.thread_settings import with_own_threads
from tiny_models import write_byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
# A package index that never answers: a first start waits for it.
SLOW_INDEX = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    connection, _ = server.accept()
    print("asked", flush=True)
    sys.stdin.read()
"""


def start(*arguments: str, **options: object) -> subprocess.Popen:
    env = with_own_threads(os.environ, "worker")        # of which launch.py has nothing to say
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def refusal(process: subprocess.Popen) -> str:
    """What it says, which must be one line, before it ends with 1."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1), err
    return err


@pytest.mark.parametrize("size_bytes", [0, 4096])
def test_a_full_disk_below_the_run_directory(tmp_path: Path, size_bytes: int) -> None:
    """Simulated by a limit on the size of files: neither lock nor page, then no page."""
    limit = (size_bytes, size_bytes)
    process = start("launch.py", "--run-dir", str(tmp_path / "run"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert f"{tmp_path / 'run'}" in (said := refusal(process)) and "File too large" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("program", ["import runpy; runpy.run_path('launch.py', run_name='__main__')", "import folovllm"])
def test_another_platform_gets_one_sentence(program: str) -> None:
    process = start("-c", f"import platform; platform.machine = lambda: 'arm64'\n{program}")
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1].endswith("FoloVLLM runs on Linux x86-64; this is linux arm64")
    assert "launch" not in program or err.count("\n") == 1


@pytest.mark.parametrize(("found", "said"), [
    ("return '2.10.1+cpu'", "torch 2.10.1+cpu is installed; FoloVLLM needs at least 2.11 and less than 3"),
    ("raise metadata.PackageNotFoundError(name)", "torch is not installed; FoloVLLM needs at least 2.11 and less than 3")])
def test_torch_is_looked_at_before_anything_starts(tmp_path: Path, found: str, said: str) -> None:
    program = f"""
import runpy, sys
from importlib import metadata
def version(name):
    {found}
metadata.version = version
sys.argv = ['launch.py', '--run-dir', {str(tmp_path / 'run')!r}]
runpy.run_path('launch.py', run_name='__main__')
"""
    assert refusal(start("-c", program)) == f"folovllm: error: {said}\n"


@pytest.mark.parametrize(("missing", "flags", "says"), [
    ("tokenizer.json", (), "tokenizer.json: no such file; a model directory needs it"),
    ("model.safetensors", (), "model.safetensors: no such file"),
    ("", ("--num-kv-blocks", "4", "--kv-cache-memory-bytes", "9999999"), "allowed: one of the two"),
    ("", ("--max-model-len", "129"), "max_model_len: was 129; allowed: up to the model's own 128")])
def test_what_a_child_refuses_is_said_once(tmp_path: Path, tiny_llama_dir: Path, missing: str, flags: tuple[str, ...], says: str) -> None:
    model_dir = tmp_path / ("a name that makes the message longer than a short text, " * 3)
    shutil.copytree(tiny_llama_dir, model_dir)
    write_byte_tokenizer(model_dir)
    if missing:
        (model_dir / missing).unlink()
    said = refusal(start("launch.py", "--run-dir", str(tmp_path / "run"), "--model", str(model_dir), *flags))
    assert said.startswith("folovllm: error: ") and says in said
    assert not (tmp_path / "run").exists()


def test_a_flag_is_not_guessed(tmp_path: Path) -> None:
    process = start("launch.py", "--run-dir", str(tmp_path / "run"), "--wind", "1")
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "unrecognized arguments: --wind 1" in err


def test_children_that_are_not_ready_get_no_time_to_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They load, and do not listen yet: waiting for them would only keep the user."""
    read_end, write_end = os.pipe()
    child = launch.Child("worker", start("-c", "import time; time.sleep(60)"), write_end)
    engine = launch.Engine(EngineConfig(), RunDir(tmp_path), None)
    engine.children["worker"] = child
    monkeypatch.setattr(engine, "_leave", lambda *_: pytest.fail("it waits"))
    engine.stop(grace_s=30.0)
    assert child.process.returncode == -signal.SIGKILL
    os.close(read_end)


class FirstStart:
    """launch.py on a terminal with an empty cache, at the moment when it waits for the package index."""

    def __init__(self, folder: Path) -> None:
        self._index = start("-c", SLOW_INDEX, stdin=subprocess.PIPE)
        port = int(self._index.stdout.readline())
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        env = kept | {"FOLOVLLM_CACHE_DIR": str(folder / "cache"), "PIP_CONFIG_FILE": os.devnull,
                      "PIP_INDEX_URL": f"http://127.0.0.1:{port}/simple"}
        self._terminal, end = pty.openpty()
        self.process = subprocess.Popen([sys.executable, "launch.py", "--run-dir", str(folder / "run")], cwd=ROOT, env=env,
                                        stdin=end, stdout=end, stderr=end, start_new_session=True)
        os.close(end)
        assert self._index.stdout.readline() == "asked\n"
        self.pids = family(self.process.pid)

    def screen(self) -> str:
        """Everything that was written to the terminal."""
        text = b""
        while True:
            try:
                text += os.read(self._terminal, 65536)
            except OSError:      # the last writer has left
                os.close(self._terminal)
                return text.decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._index.communicate("")


def family(pid: int) -> list[int]:
    """The process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in family(int(child)))]


def until(condition: Callable[[], bool], timeout_s: float = 2.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_first_start_that_is_ended(tmp_path: Path, how: signal.Signals) -> None:
    first = FirstStart(tmp_path)
    try:
        assert len(first.pids) == 3         # launch, the resolver, pip
        first.process.send_signal(how)
        assert first.process.wait(2) == (-signal.SIGKILL if how is signal.SIGKILL else 0)
        assert until(lambda: all(process_state(pid) == "dead" for pid in first.pids))
        screen = first.screen()
        assert "Traceback" not in screen
        if how is not signal.SIGKILL:
            assert screen.endswith("\x1b[?25h")          # the bar that hid the cursor cannot show it again
            assert not (tmp_path / "run").exists()
    finally:
        first.close()


@pytest.mark.parametrize(("end", "said"), [
    ("os.kill(os.getpid(), 9)", "worker was killed by SIGKILL while starting"),
    ("os.kill(os.getpid(), signal.SIGBUS)", "worker was killed by SIGBUS while starting"),
    ("os._exit(3)", "worker exited with code 3 while starting; what it said, if anything, is above")])
def test_a_child_that_dies_without_a_word_is_no_reason_to_look_for_its_log(tmp_path: Path, end: str, said: str) -> None:
    engine = launch.Engine(EngineConfig(), RunDir(tmp_path), None)
    process = start("-c", f"import os, signal; {end}")
    process.communicate(timeout=60)
    child = launch.Child("worker", process, -1)
    assert engine._why(child) == said
    ProgressPage.create(engine.run_dir.page("worker"), "worker", epoch=1, gen=1).set_text("error", "model: is wrong")
    assert engine._why(child) == "model: is wrong"


@pytest.mark.parametrize(("end", "said"), [
    ("os.kill(os.getpid(), 9)", "model: the process that fetches and converts it was killed by SIGKILL"),
    ("os._exit(3)", "model: could not be fetched or converted; the reason, if one was given, is above"),
    ("print('the disk is full'); sys.exit(1)", "model: the disk is full")])
def test_a_model_that_is_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str, said: str) -> None:
    (tmp_path / "resolver_stand_in.py").write_text(f"import os, sys\n{end}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    class NoWakeups:
        sleep = staticmethod(time.sleep)

    with pytest.raises(launch.StartError) as caught:
        launch.run_resolver("resolver_stand_in", [], NoWakeups)
    assert str(caught.value) == said
