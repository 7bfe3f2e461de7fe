"""What ``folovllm status`` reads, and how a client notices a death: pages and lock alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from frontend import cli
from frontend.client import Client
from frontend.errors import EngineNotRunning
from frontend.status import cause_of_death, process_state, read_status, state_of
from protocol.config import EngineConfig
from protocol.progress import ProgressPage, State
from protocol.run_dir import RunDir

SWITCHES = ("ignore-eos,", "skip-special-tokens,", "include-stop-str-in-output,")     # "--x, --no-x  help"
NO_PID = 2**22 + 1       # above what Linux gives out


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """An engine whose processes are all this one."""
    run_dir = RunDir(tmp_path)
    run_dir.lock_file.write_text(str(os.getpid()))
    run_dir.write_config(EngineConfig(model_name="tiny"))
    for role in ("frontend", "worker", "core", "launch"):
        page = ProgressPage.create(run_dir.page(role), role, epoch=1, gen=1)
        page.set("state", State.READY)
        if role == "core":
            for name, value in (("running", 3), ("waiting", 2), ("blocks", 100), ("used_blocks", 40)):
                page.set(name, value)
        if role == "worker":
            page.set_text("device", "cpu")
    return run_dir


def set_page(run_dir: RunDir, role: str, **values: int) -> ProgressPage:
    page = ProgressPage(run_dir.page(role), writable=True)
    for name, value in values.items():
        page.set(name, value)
    return page


def test_json_has_the_promised_shape(run_dir: RunDir, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["status", "--json", "--run-dir", str(run_dir.path)]) == 0
    pid = os.getpid()
    assert json.loads(capsys.readouterr().out) == {
        "processes": [{"role": role, "pid": pid, "rank": 0, "epoch": 1, "gen": 1, "state": "ready"}
                      for role in ("launch", "core", "worker", "frontend")],
        "requests": {"running": 3, "waiting": 2}, "kv": {"blocks": 100, "used": 40},
        "model": "tiny", "device": "cpu"}


def test_for_people_it_says_the_same(run_dir: RunDir, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["status", "--run-dir", str(run_dir.path)]) == 0
    text = capsys.readouterr().out
    assert "tiny" in text and "running 3  waiting 2" in text and "40 of 100" in text and text.count("ready") == 4


def test_a_dead_process_is_shown_as_dead(run_dir: RunDir) -> None:
    set_page(run_dir, "worker", pid=NO_PID)
    states = {p["role"]: p["state"] for p in read_status(run_dir)["processes"]}
    assert states == {"launch": "ready", "core": "ready", "worker": "dead", "frontend": "ready"}


def test_loading_and_failed_are_states(run_dir: RunDir) -> None:
    set_page(run_dir, "core", state=State.LOADING)
    set_page(run_dir, "worker", state=State.FAILED)
    states = {p["role"]: p["state"] for p in read_status(run_dir)["processes"]}
    assert (states["core"], states["worker"]) == ("loading", "failed")


@pytest.mark.parametrize(("letter", "state"), [
    ("R", None), ("S", None), ("D", None), ("I", None), ("T", "stopped"), ("t", "stopped"), ("Z", "dead"),
    ("X", "dead")])
def test_state_letters_of_proc(letter: str, state: str | None) -> None:
    assert state_of(f"12 (a name) with) brackets) {letter} 1 2 3") == state


def test_process_state_of_the_living_and_the_dead() -> None:
    assert process_state(os.getpid()) is None and process_state(NO_PID) == "dead"


def test_before_there_are_pages_the_lock_tells_of_launch(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.lock_file.write_text(str(os.getpid()))
    status = read_status(run_dir)
    assert [p["role"] for p in status["processes"]] == ["launch"]
    assert status["requests"] == {"running": 0, "waiting": 0} and status["model"] == ""


def test_a_torn_page_is_passed_over(run_dir: RunDir) -> None:
    run_dir.page("worker").write_bytes(b"")
    assert [p["role"] for p in read_status(run_dir)["processes"]] == ["launch", "core", "frontend"]


@pytest.mark.parametrize("command", [["status"], ["complete", "x"], ["chat"]])
def test_without_an_engine_the_directory_and_a_remedy_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, command: list[str],
) -> None:
    assert cli.main([*command, "--run-dir", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error and "launch.py" in error and "--run-dir" in error


def test_a_client_without_an_engine_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(str(NO_PID))         # left behind by a killed engine
    with pytest.raises(EngineNotRunning, match="no engine runs at"):
        Client(str(tmp_path))


def test_causes_of_death(run_dir: RunDir) -> None:
    assert cause_of_death(run_dir) is None
    page = set_page(run_dir, "worker", state=State.FAILED)
    page.set_text("error", "no such file")
    assert cause_of_death(run_dir) == "the worker process failed: no such file"
    set_page(run_dir, "worker", state=State.READY)
    set_page(run_dir, "frontend", pid=NO_PID)
    assert "frontend process" in cause_of_death(run_dir) and str(NO_PID) in cause_of_death(run_dir)
    set_page(run_dir, "frontend", pid=os.getpid())
    run_dir.lock_file.unlink()
    assert "has ended" in cause_of_death(run_dir)


def test_bad_flags_are_one_clear_error(run_dir: RunDir, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["complete", "x", "--top-p", "3", "--run-dir", str(run_dir.path)]) == 1
    assert capsys.readouterr().err == "folovllm: error: top_p: was 3.0; allowed: (0, 1]\n"
    with pytest.raises(SystemExit) as caught:
        cli.main(["complete", "x", "--logit-bias", "5"])
    assert caught.value.code == 2 and "id=value" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["complete", "chat", "status"])
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--run-dir" in shown
    if command != "status":
        flags = shown.split("sampling: ")[1].split(" --")[1:]
        assert len(flags) >= 18 and all("(default: " in flag or flag in SWITCHES for flag in flags)
        assert "below 1e-5 is greedy (default: the model's own, else 1.0)" in shown


def test_a_flag_is_not_guessed(run_dir: RunDir, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["complete", "x", "--temp", "0"])
    assert "unrecognized arguments: --temp" in capsys.readouterr().err


def test_sampling_flags_become_params() -> None:
    arguments = cli.parse(["complete", "x", "--logit-bias=5=1.5,6=-2", "--stop-token-ids", "3,4", "--stop", "a",
                           "--stop", "b", "--ignore-eos", "--temperature", "0", "--seed", "7"])
    params = cli.sampling_params(arguments)
    assert params.logit_bias == {5: 1.5, 6: -2.0} and params.stop_token_ids == [3, 4] and params.stop == ["a", "b"]
    assert (params.ignore_eos, params.temperature, params.seed, params.max_tokens) == (True, 0.0, 7, 128)
