"""A real worker process with a tiny random model, spoken to in the raw protocol.

The test plays launch.py (run directory, lifeline) and the core (socket, plans).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq

from protocol.codec import PROTOCOL_VERSION, i32_bytes, i32_column
from protocol.config import EngineConfig, ModelConfig, SchedulerConfig
from protocol.lifeline import send_control
from protocol.messages import Drain
from protocol.progress import ProgressPage, State
from protocol.run_dir import RunDir
from protocol.sampling_params import TokenParams
from protocol.steps import Admission, Hello, StepPlan, StepResult, StepStatus, WorkerReady, to_core, to_worker
from protocol.transport import Peers, Sent, new_context

ROOT = Path(__file__).resolve().parents[2]
WORKER = b"w0.g3"
EPOCH, GEN = 5, 3
TIMEOUT_S = 60


class Harness:
    """One run directory, one worker process, the core's end of its socket."""

    def __init__(self, path: Path, model_dir: Path, model: ModelConfig) -> None:
        self.run_dir = RunDir(path)
        self.run_dir.write_config(EngineConfig(model=model, scheduler=SchedulerConfig(max_num_seqs=4), model_dir=str(model_dir)))
        self.context = new_context()
        self.peers = Peers(self.context, self.run_dir.worker_socket)
        read_fd, self.lifeline_fd = os.pipe()
        arguments = ["--run-dir", str(path), "--lifeline-fd", str(read_fd), "--epoch", str(EPOCH), "--gen", str(GEN), "--rank", "0"]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gpu_worker.process", *arguments], pass_fds=(read_fd,), stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=path)
        os.close(read_fd)

    def receive(self) -> object:
        """The worker's next message."""
        assert self.peers.socket.poll(TIMEOUT_S * 1000, zmq.POLLIN), "the worker says nothing"
        (routing_id, frame), = self.peers.receive(limit=1)
        assert routing_id == WORKER
        return to_core.decode(frame)

    def send(self, message: object) -> None:
        assert self.peers.send(WORKER, to_worker.encode(message)) is Sent.OK

    def greet(self, epoch: int = EPOCH) -> WorkerReady:
        self.send(Hello(PROTOCOL_VERSION, "core", b"", epoch))
        ready = self.receive()
        assert isinstance(ready, WorkerReady)
        return ready

    def run(self, plan: StepPlan) -> StepResult:
        self.send(plan)
        result = self.receive()
        assert isinstance(result, StepResult) and result.step_id == plan.step_id
        return result

    def page(self) -> ProgressPage:
        return ProgressPage(self.run_dir.page("worker"))

    def close_lifeline(self) -> None:
        if self.lifeline_fd >= 0:
            os.close(self.lifeline_fd)
            self.lifeline_fd = -1

    def close(self) -> None:
        self.close_lifeline()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.peers.close()
        self.context.term()


@pytest.fixture
def harness(tmp_path: Path, tiny_llama_dir: Path) -> Iterator[Harness]:
    worker = Harness(tmp_path, tiny_llama_dir, ModelConfig(dtype="float32", device="cpu", num_threads=1))
    yield worker
    worker.close()


def new_request(step_id: int, prompt: list[int], epoch: int = EPOCH, gen: int = GEN, restart_after: int | None = None) -> StepPlan:
    """A plan that admits one greedy request to row 0 and runs its whole prompt."""
    admission = Admission(0, i32_bytes(prompt), len(prompt), 0, i32_bytes([3]), TokenParams(max_tokens=8, temperature=0.0), 1)
    return StepPlan(epoch, gen, step_id, restart_after, [admission], b"", i32_bytes([0]), i32_bytes([0]), i32_bytes([len(prompt)]))


def decode(step_id: int, num_computed: int) -> StepPlan:
    return StepPlan(EPOCH, GEN, step_id, None, [], b"", i32_bytes([0]), i32_bytes([num_computed]), i32_bytes([1]))


def test_handshake_steps_and_drain(harness: Harness) -> None:
    assert harness.receive() == Hello(PROTOCOL_VERSION, "worker", WORKER, EPOCH)
    ready = harness.greet()
    assert (ready.epoch, ready.gen, ready.max_num_seqs, ready.vocab_size, ready.max_model_len) == (EPOCH, GEN, 4, 257, 128)
    assert ready.num_blocks == 4 * 128 // 32
    assert i32_column(ready.eos_token_ids).tolist() == [2]
    assert ready.numerics_fingerprint

    first = harness.run(new_request(0, [5, 6, 7]))
    second = harness.run(decode(1, 3))
    token, = i32_column(first.token_ids).tolist()
    again = harness.run(new_request(2, [5, 6, 7, token]))
    assert again.token_ids == second.token_ids        # the sampled token was fed back
    page = harness.page()
    assert page.get_text("device") == "cpu" and page.get_text("dtype") == "float32"
    assert page.get("state") == State.READY and page.get("steps_done") == 3 and page.get("tokens") == 3
    assert page.get_text("fingerprint") == ready.numerics_fingerprint

    send_control(harness.lifeline_fd, Drain(0.0))
    assert harness.process.wait(TIMEOUT_S) == 0


def test_second_plan_is_sent_before_the_first_result(harness: Harness) -> None:
    """Window 2: the second plan was made without knowing the token that it computes."""
    harness.receive()
    harness.greet()
    plans = [new_request(0, [5, 6, 7]), decode(1, 3), decode(2, 4)]
    one_by_one = [harness.run(plan).token_ids for plan in plans]
    for plan in plans:
        harness.send(plan)
    results = [harness.receive() for _ in plans]
    assert [result.step_id for result in results] == [0, 1, 2]
    assert [result.token_ids for result in results] == one_by_one


def test_failed_step_is_followed_by_skipped_ones(harness: Harness) -> None:
    harness.receive()
    harness.greet()
    assert harness.run(new_request(0, [5, 6, 7])).status is StepStatus.OK
    bad = harness.run(decode(1, 77))
    assert bad.status is StepStatus.FAILED_BAD_PLAN and "num_computed" in bad.detail
    assert harness.run(decode(2, 3)).status is StepStatus.SKIPPED
    assert harness.run(new_request(3, [5, 6, 7], restart_after=1)).status is StepStatus.OK


def test_new_core_finds_no_rows_and_old_plans_are_dropped(harness: Harness) -> None:
    harness.receive()
    harness.greet()
    harness.run(new_request(0, [5, 6, 7]))
    assert harness.greet(EPOCH + 1).epoch == EPOCH + 1
    harness.send(new_request(1, [5, 6, 7]))                                       # of the old epoch
    harness.send(new_request(1, [5, 6, 7], epoch=EPOCH + 1, gen=GEN - 1))         # for an older worker
    orphan = StepPlan(EPOCH + 1, GEN, 7, None, [], b"", i32_bytes([0]), i32_bytes([3]), i32_bytes([1]))
    assert harness.run(orphan).status is StepStatus.FAILED_BAD_PLAN
    harness.greet(EPOCH + 2)                                                      # forgets the failure too
    assert harness.run(new_request(8, [5, 6, 7], epoch=EPOCH + 2)).status is StepStatus.OK


def test_worker_ends_with_its_parent(harness: Harness) -> None:
    harness.receive()
    harness.close_lifeline()
    assert harness.process.wait(TIMEOUT_S) == 0


def test_idle_worker_sleeps(harness: Harness) -> None:
    harness.receive()
    harness.greet()
    process = psutil.Process(harness.process.pid)
    before = sum(process.cpu_times()[:2])
    page, ticks = harness.page(), harness.page().get("ticks")
    while page.get("ticks") < ticks + 3:                  # it ticks once a second
        assert not harness.peers.socket.poll(200, zmq.POLLIN)
    assert sum(process.cpu_times()[:2]) - before <= 0.05


@pytest.mark.parametrize(("remove", "message"), [("model.safetensors", "model.safetensors: no such file"),
                                                 ("config.json", "config.json: no such file")])
def test_missing_file_is_named(tmp_path: Path, tiny_llama_dir: Path, remove: str, message: str) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    for entry in tiny_llama_dir.iterdir():
        if entry.name != remove:
            (model_dir / entry.name).symlink_to(entry)
    check_refused(tmp_path, model_dir, ModelConfig(dtype="float32", device="cpu"), message)


def test_length_beyond_the_model_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    check_refused(tmp_path, tiny_llama_dir, ModelConfig(dtype="float32", device="cpu", max_model_len=129), "max_model_len: was 129")


def check_refused(path: Path, model_dir: Path, model: ModelConfig, message: str) -> None:
    worker = Harness(path, model_dir, model)
    try:
        _out, err = worker.process.communicate(timeout=TIMEOUT_S)
        assert worker.process.returncode == 1
        assert err == ""                      # launch.py says it
        assert message in worker.page().get_text("error")
        assert worker.page().get("state") == State.FAILED
    finally:
        worker.close()


def test_wrong_protocol_version_is_refused(harness: Harness) -> None:
    harness.receive()
    harness.send(Hello(PROTOCOL_VERSION + 1, "core", b"", EPOCH))
    assert harness.process.wait(TIMEOUT_S) == 1
    assert "protocol" in harness.page().get_text("error")


def test_hostile_frames_are_dropped(harness: Harness) -> None:
    harness.receive()
    for frame in (b"", b"\xc1", b"\x93\x02\x01\x02", b"\x91\xcd\x03\xe7", b"\x91" * 5000, np.random.default_rng(0).bytes(4000)):
        assert harness.peers.send(WORKER, frame) is Sent.OK
    assert harness.greet().epoch == EPOCH
