"""``LLMEngine`` and its private processes: start, use, every way to end.

launch.py is replaced by ``stand_in_launch`` (a frontend with a fake core): what is tested
is the program's side.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from frontend import engine_process
from frontend.client import Client
from frontend.errors import EngineDead, EngineError, EngineNotRunning
from frontend.llm_engine import LLM, LLMEngine, engine_config
from frontend.status import process_state
from frontend_harness import expected, expected_text
from protocol.config import ConfigError, ModelConfig, SchedulerConfig
from protocol.sampling_params import SamplingParams

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEN = SamplingParams(max_tokens=10)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that holds the stand-in as ``launch``, first on the engine's path."""
    (tmp_path / "launch.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport stand_in_launch\nstand_in_launch.main()\n")
    monkeypatch.setattr(engine_process, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def engine(root: Path) -> Iterator[LLMEngine]:
    with LLMEngine() as engine:
        yield engine


def launch_pid(engine: LLMEngine) -> int:
    return int(engine.run_dir.lock_file.read_text())


def gone(pid: int, within_s: float = 2.0) -> bool:
    deadline_s = time.monotonic() + within_s
    while process_state(pid) != "dead":
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def test_it_generates_and_leaves_nothing_behind(root: Path) -> None:
    with LLMEngine() as engine:
        pid, path = launch_pid(engine), engine.run_dir.path
        assert path.stat().st_mode & 0o777 == 0o700
        outputs = engine.generate(["ab", [7]], TEN)
        assert [o.outputs[0].text for o in outputs] == [expected_text([2], 10), expected_text([7], 10)]
        assert list(engine.generate_batch(["a", "b"], TEN)) == ["2", "3"]
        assert engine.chat([{"role": "user", "content": "c"}], TEN)[0].outputs[0].text == expected_text([3], 10)
    assert process_state(pid) == "dead" and not path.exists()
    engine.close()      # a second time is no error
    with pytest.raises(EngineError, match="closed"):
        engine.generate(["a"], TEN)


def test_two_engines_do_not_disturb_each_other(engine: LLMEngine, root: Path) -> None:
    with LLM("other", max_num_seqs=8) as second:
        assert second.run_dir.path != engine.run_dir.path and second.facts["max_num_seqs"] == "8"
        assert second.generate("a", TEN)[0].outputs[0].text == expected_text([1], 10)
    assert engine.generate("b", TEN)[0].outputs[0].text == expected_text([2], 10)


def test_a_given_run_dir_is_used_and_others_may_connect(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    with LLMEngine(run_dir=str(path)) as engine, Client(str(path)) as client:
        assert engine.run_dir.path == path
        assert client.generate("a", TEN)[0].outputs[0].text == expected_text([1], 10)


def test_launchs_own_words_are_the_exception(root: Path) -> None:
    with pytest.raises(EngineNotRunning, match="could not start: model: was 'broken'"):
        LLMEngine(ModelConfig(model="broken"))
    with pytest.raises(EngineNotRunning, match="ended with code 3"):
        LLMEngine(ModelConfig(model="silent"))


def test_the_engines_death_is_told_not_waited_for(engine: LLMEngine) -> None:
    stream = engine.stream("a", SamplingParams(max_tokens=9000))
    next(stream)
    os.kill(launch_pid(engine), signal.SIGKILL)
    with pytest.raises(EngineDead):
        stream.result()


def test_a_thread_that_started_it_may_end(root: Path) -> None:
    made: list[LLMEngine] = []
    thread = threading.Thread(target=lambda: made.append(LLMEngine()))
    thread.start()
    thread.join()
    with made[0] as engine:
        assert engine.generate("a", TEN)[0].outputs[0].text == expected_text([1], 10)


def test_threads_generate_side_by_side(engine: LLMEngine) -> None:
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        found[i] = engine.generate([[i]], TEN)[0].outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: expected([i], 10) for i in range(1, 9)}


def test_a_forked_child_neither_ends_it_nor_keeps_it(root: Path) -> None:
    engine = LLMEngine()
    pid = launch_pid(engine)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        engine.close()               # nothing: not his
        os.read(read, 1)             # stays until the test is over
        os._exit(0)
    os.close(read)
    try:
        assert engine.generate("a", TEN)[0].outputs[0].text == expected_text([1], 10)
        engine.close()
        assert gone(pid)             # though the child still lives
    finally:
        os.close(write)
        os.waitpid(child, 0)


PROGRAM = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from frontend import engine_process
engine_process.ROOT = Path({stand_in!r})
from frontend.llm_engine import LLMEngine
from protocol.sampling_params import SamplingParams
engine = LLMEngine()
stream = engine.stream("a", SamplingParams(max_tokens=9000, stop="!"))
next(stream)
print(engine.run_dir.lock_file.read_text(), engine.run_dir.path, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "SIGINT", "exit", "exception", "os._exit"])
def test_however_the_program_ends_the_engine_ends(root: Path, end: str) -> None:
    last = {"exit": "", "exception": "1 / 0", "os._exit": "import os; os._exit(1)"}.get(
        end, "import time; time.sleep(60)")
    program = PROGRAM.format(root=str(ROOT), tests=str(HERE.parent), stand_in=str(root), end=last)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as process:
        pid, path = process.stdout.readline().split()
        if end.startswith("SIG"):
            process.send_signal(getattr(signal, end))
        process.wait(10)
    assert gone(int(pid))
    shutil.rmtree(path, ignore_errors=True)     # launch.py itself removes it; the stand-in does not


def test_settings_have_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOVLLM_MAX_NUM_SEQS", "5")
    monkeypatch.setenv("FOLOVLLM_WINDOW", "2")
    monkeypatch.setenv("FOLOVLLM_RUN_DIR", "/somewhere/else")
    scheduler = SchedulerConfig(max_num_seqs=7, window=1)
    config = engine_config(ModelConfig(dtype="float32"), scheduler, {"window": 1, "seed": 3})
    assert (config.model.dtype, config.model.seed) == ("float32", 3)
    assert (config.scheduler.max_num_seqs, config.scheduler.window) == (7, 1)
    assert config.run.run_dir is None                  # a private engine has its own
    assert engine_config(None, None, {}).scheduler.max_num_seqs == 5
    assert "FOLOVLLM_WINDOW" not in engine_process._environment()


@pytest.mark.parametrize(("flags", "says"), [
    ({"modle": "x"}, "modle"), ({"window": 3}, "window"), ({"dtype": "int3"}, "dtype")])
def test_wrong_settings_are_refused_before_anything_starts(flags: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LLMEngine(**flags)
    with pytest.raises(ConfigError, match="scheduler_config"):
        LLMEngine(None, ModelConfig())
