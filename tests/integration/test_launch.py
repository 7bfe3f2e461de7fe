"""``python launch.py`` with the default model: ready line, use, every way to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from folovllm import Client, SamplingParams
from frontend.errors import EngineError
from protocol.parent_death import EXIT_PEER_LOST
from protocol.progress import ProgressPage
from protocol.thread_settings import with_own_threads

ROOT = Path(__file__).resolve().parents[2]
START_S, END_S = 60.0, 2.0
GREEDY = SamplingParams(max_tokens=16, temperature=0.0)
ENDLESS = SamplingParams(max_tokens=2000, ignore_eos=True, temperature=0.0)
ROLES = ("launch", "core", "worker", "frontend")


class Launched:
    """One engine started the way a user does."""

    def __init__(self, run_dir: Path, *flags: str) -> None:
        self.run_dir = run_dir
        self.process = subprocess.Popen([sys.executable, "launch.py", "--run-dir", str(run_dir), *flags], cwd=ROOT, text=True,
                                        env=with_own_threads(os.environ, "worker"),     # of which launch.py has nothing to say
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def ready_line(self) -> str:
        return self.process.stdout.readline()

    def pids(self) -> dict[str, int]:
        return {role: ProgressPage(self.run_dir / f"{role}0.page").get("pid") for role in ROLES}

    def wait(self, timeout_s: float = END_S) -> int:
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(10)
        self.process.stdout.close()
        self.process.stderr.close()


def all_gone(pids: dict[str, int], within_s: float = END_S) -> bool:
    """Also true for a pid that is left as a zombie to another parent."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        left = [pid for pid in pids.values() if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not left:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def launched(tmp_path: Path, default_model_dir: Path) -> Iterator[Launched]:
    engine = Launched(tmp_path / "run", "--model", "default", "--num-kv-blocks", "512")
    yield engine
    engine.close()


def test_ready_chat_and_ctrl_c(launched: Launched) -> None:
    line = launched.ready_line()
    assert line.startswith("ready in ")
    for part in (" s  model=SmolLM2-135M-Instruct", "device=cpu", "kv_tokens=16384", "threads=", f"zmq=ipc://{launched.run_dir}/client.sock"):
        assert part in line
    pids = launched.pids()
    with Client(str(launched.run_dir)) as client:
        text = "".join(delta.text for delta in client.chat("What is the capital of France?", GREEDY))
    assert text == "The capital of France is Paris."
    for role in ("launch", "core", "frontend"):
        assert "libtorch" not in Path(f"/proc/{pids[role]}/maps").read_text(), role
    assert "libtorch" in Path(f"/proc/{pids['worker']}/maps").read_text()
    launched.process.send_signal(signal.SIGINT)
    assert launched.wait() == 0
    assert all_gone(pids) and not launched.run_dir.exists()
    assert launched.process.stderr.read() == ""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ended_during_generation(launched: Launched, how: signal.Signals) -> None:
    launched.ready_line()
    pids = launched.pids()
    with Client(str(launched.run_dir)) as client:
        stream = client.stream("Once upon a time", ENDLESS)
        next(stream)
        launched.process.send_signal(how)
        with pytest.raises(EngineError):
            stream.result()
    assert launched.wait() == 0
    assert all_gone(pids) and not launched.run_dir.exists()


@pytest.mark.parametrize("role", ["worker", "core", "frontend"])
def test_a_dead_child_ends_everything(launched: Launched, role: str) -> None:
    """Every stream gets a typed error, launch.py exits with 70, within 2 s, nothing is left."""
    launched.ready_line()
    pids = launched.pids()
    with Client(str(launched.run_dir)) as client:
        stream = client.stream("Once upon a time", ENDLESS)
        next(stream)
        killed_s = time.monotonic()
        os.kill(pids[role], signal.SIGKILL)
        with pytest.raises(EngineError):
            stream.result()
        assert launched.wait() == EXIT_PEER_LOST
        assert time.monotonic() - killed_s < END_S
    assert all_gone(pids) and not launched.run_dir.exists()
    assert f"{role} (pid {pids[role]}) was killed by SIGKILL" in launched.process.stderr.read()


def test_killed_parent_takes_its_children_along(launched: Launched) -> None:
    launched.ready_line()
    pids = launched.pids()
    launched.process.kill()
    assert all_gone(pids)
    assert not list(launched.run_dir.glob("*.sock"))
    again = Launched(launched.run_dir, "--num-kv-blocks", "512")      # what a dead engine left is no hindrance
    try:
        assert again.ready_line().startswith("ready in ")
    finally:
        again.close()


def test_a_used_run_dir_is_refused_and_undisturbed(launched: Launched) -> None:
    launched.ready_line()
    second = Launched(launched.run_dir)
    assert second.wait(10) == 1
    assert f"is in use by the engine with pid {launched.process.pid}" in second.process.stderr.read()
    second.close()
    with Client(str(launched.run_dir)) as client:
        assert len(client.generate("Hello", GREEDY)[0].outputs[0].token_ids) == 16


@pytest.mark.parametrize(("flags", "message"), [
    (["--model", "/nowhere"], "model: was '/nowhere', which is no directory and no file here"),
    (["--max-num-seqs", "0"], "max_num_seqs: was 0"),
    (["--max-model-len", "9000"], "max_model_len: was 9000; allowed: up to the model's own 8192"),
    (["--num-kv-blocks", "1", "--max-model-len", "1"], None),
    (["--device", "cuda"], "cuda"),
])
def test_what_cannot_start_says_why(tmp_path: Path, default_model_dir: Path, flags: list[str], message: str | None) -> None:
    engine = Launched(tmp_path / "run", *flags)
    try:
        if message is None:      # as small as it gets, but it runs
            assert "kv_tokens=32" in engine.ready_line()
            return
        assert engine.wait(START_S) == 1
        words = engine.process.stderr.read()
        assert message in words and "Traceback" not in words
        assert not (tmp_path / "run").exists()
    finally:
        engine.close()


def test_a_directory_that_lacks_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    engine = Launched(tmp_path / "run", "--model", str(tmp_path / "model"))
    assert engine.wait(START_S) == 1
    assert "has no config.json" in engine.process.stderr.read()
    engine.close()
