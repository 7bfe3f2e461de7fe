"""``folovllm complete`` and ``chat`` against a frontend with a fake core."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from frontend import cli
from frontend_harness import FrontendHarness, expected_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FrontendHarness]:
    harness = FrontendHarness(tmp_path).start()
    yield harness
    harness.stop()


def run(engine: FrontendHarness, *arguments: str) -> int:
    return cli.main([*arguments, "--run-dir", str(engine.run_dir.path)])


def test_complete_continues_the_text(engine: FrontendHarness, capsys: pytest.CaptureFixture) -> None:
    assert run(engine, "complete", "abc", "--max-tokens", "5") == 0
    assert capsys.readouterr().out == expected_text([3], 5) + "\n"


def test_complete_shows_several_continuations(engine: FrontendHarness, capsys: pytest.CaptureFixture) -> None:
    assert run(engine, "complete", "abc", "--max-tokens", "2", "--n", "2") == 0
    assert capsys.readouterr().out == "[0] de\n[1] de\n"


def test_complete_reads_standard_input(engine: FrontendHarness, capsys: pytest.CaptureFixture,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("c"))
    assert run(engine, "complete", "-", "--max-tokens", "1") == 0
    assert capsys.readouterr().out == "d\n"


def test_too_long_is_one_line_and_exit_code_1(engine: FrontendHarness, capsys: pytest.CaptureFixture) -> None:
    assert run(engine, "complete", "abc", "--max-tokens", "10000") == 1
    error = capsys.readouterr().err
    assert error.startswith("folovllm: error: max_tokens: ") and error.count("\n") == 1 and "10000" in error


def test_chat_remembers_and_forgets(engine: FrontendHarness, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb\n/clear\nc\n"))
    assert run(engine, "chat", "--system", "z", "--max-tokens", "3") == 0
    assert capsys.readouterr().out == "bcd\ncde\ndef\n"
    assert [len(add.prompt_ids) // 4 for add in engine.core.adds] == [2, 6, 2]    # "za", "za" "bcd" "b", "zc"


def test_a_refused_turn_is_taken_back(engine: FrontendHarness, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 9999 + "\nb\n"))
    assert run(engine, "chat", "--max-tokens", "3") == 0
    output = capsys.readouterr()
    assert output.out == "cde\n" and "/clear starts anew" in output.err


class Terminal:
    """``folovllm chat`` on a terminal of its own."""

    def __init__(self, engine: FrontendHarness) -> None:
        leader, follower = pty.openpty()
        command = [sys.executable, "-P", "-m", "frontend.cli", "chat", "--stop", "!",
                   "--run-dir", str(engine.run_dir.path)]
        self.process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
            preexec_fn=lambda: fcntl.ioctl(follower, termios.TIOCSCTTY, 0))      # Ctrl-C is for it
        os.close(follower)
        self.leader, self.seen = leader, b""

    def await_text(self, text: bytes) -> None:
        """Read until ``text`` has come, and forget it."""
        deadline_s = time.monotonic() + 10
        while text not in self.seen:
            assert time.monotonic() < deadline_s, self.seen
            self.seen += os.read(self.leader, 4096)
        self.seen = self.seen.split(text, 1)[1]

    def type(self, text: bytes) -> None:
        os.write(self.leader, text)


def test_on_a_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_program(engine: FrontendHarness) -> None:
    terminal = Terminal(engine)
    try:
        terminal.await_text(b"Ctrl-D leaves")
        terminal.await_text(b"> ")
        terminal.type(b"a\n")
        terminal.await_text(b"bcdefghijkl")           # an answer of ten thousand tokens
        terminal.type(b"\x03")
        terminal.await_text(b"(interrupted)")
        terminal.await_text(b"> ")
        terminal.type(b"\x03")
        terminal.await_text(b"(Ctrl-D leaves)")
        terminal.await_text(b"> ")
        deadline_s = time.monotonic() + 10
        while len(engine.core.aborts) != 1:      # it travels through the frontend
            assert time.monotonic() < deadline_s, engine.core.aborts
            time.sleep(0.01)
        terminal.type(b"\x04")
        assert terminal.process.wait(10) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.leader)
