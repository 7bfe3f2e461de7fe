"""A frontend on real sockets in this process: fake core and fake tokenizer around it.

The frontend's loop and the core's run in a thread each; clients under test run in the
test's own.  Tokens are predictable: token i of a stream is ``expected(prompt, i)``.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import zmq

from frontend.intake import Intake
from frontend.process import FrontendProcess
from frontend_fakes import FakeDetokenizer, FakeTokenizer, ids, outputs, ready, text_of
from protocol.child import ChildContext
from protocol.config import EngineConfig, SchedulerConfig
from protocol.lifeline import Lifeline, send_control
from protocol.messages import Abort, Accepted, Add, Drain, Finish, PeerDied, to_core, to_frontend
from protocol.progress import ProgressPage
from protocol.run_dir import RunDir
from protocol.steps import Hello
from protocol.transport import Peers, new_context

STEP_MS = 1


def expected(prompt: list[int], count: int) -> list[int]:
    """The output of the fake core: letters after the prompt's last one, round and round."""
    return [1 + (prompt[-1] + i) % 26 for i in range(count)]


def expected_text(prompt: list[int], count: int) -> str:
    return "".join(map(text_of, expected(prompt, count)))


class FakeTemplate:
    """A conversation is its contents, one after the other."""

    def render(self, messages: list) -> list[int]:
        return FakeTokenizer().encode("".join(message.content for message in messages))


class FakeCore(threading.Thread):
    """One token a stream and step; ``paused`` holds everything back."""

    def __init__(self, run_dir: RunDir) -> None:
        super().__init__(daemon=True)
        self.peers = Peers(new_context(), run_dir.core_socket)
        self.paused, self.ending = threading.Event(), threading.Event()
        self.adds: list[Add] = []
        self.aborts: list[Abort] = []
        self._live: dict[int, list] = {}      # stream → [Add, tokens sent]
        self._seq = 0
        self._frontend = b""

    def run(self) -> None:
        while not self.ending.is_set():
            self.peers.socket.poll(STEP_MS, zmq.POLLIN)
            for routing_id, frame in self.peers.receive():
                self._frontend = routing_id
                self._handle(to_core.decode(frame))
            if self._live and not self.paused.is_set():
                self._step()
        self.peers.close()

    def _handle(self, message: object) -> None:
        match message:
            case Hello():
                self._say(ready, ())
            case Add():
                self.adds.append(message)
                self._live[message.stream] = [message, 0]
                self._say(Accepted, (message.stream,))
            case Abort():
                self.aborts.append(message)
                self._live = {s: entry for s, entry in self._live.items() if entry[0].key != message.key
                              or message.child not in (None, entry[0].child)}

    def _step(self) -> None:
        rows = []
        for stream, entry in list(self._live.items()):
            add, sent = entry
            limit = add.params.max_tokens
            tokens = expected(ids(add.prompt_ids), limit)
            count = limit if add.output_kind else 1
            finish = Finish.LENGTH if sent + count == limit else Finish.NONE
            rows.append((stream, sent, tokens[sent:sent + count], finish))
            entry[1] += count
            if finish:
                del self._live[stream]
        self._say(outputs, rows)

    def _say(self, make, arguments) -> None:
        self._seq += 1
        self.peers.send(self._frontend, to_frontend.encode(make(self._seq, *arguments)))


class FrontendHarness:
    """Everything of an engine that a client can see."""

    def __init__(self, path: Path, scheduling_policy: str = "fcfs") -> None:
        path.chmod(0o700)
        self.run_dir = RunDir(path)
        self.run_dir.lock_file.write_text(str(os.getpid()))
        config = EngineConfig(model_name="fake", scheduler=SchedulerConfig(scheduling_policy=scheduling_policy))
        self.run_dir.write_config(config)
        lifeline_read, self._lifeline = os.pipe()
        self.page = ProgressPage.create(self.run_dir.page("frontend"), "frontend", epoch=1)
        context = ChildContext("frontend", 0, 1, 1, self.run_dir, config, Lifeline(lifeline_read), self.page)
        self.frontend = FrontendProcess(context, Intake(FakeTokenizer(), FakeTemplate(), config), FakeDetokenizer)
        self.core = FakeCore(self.run_dir)
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> "FrontendHarness":
        self.core.start()
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self.exit_code = self.frontend.run()
        except SystemExit:
            pass      # a test killed it
        finally:
            self.frontend.close()

    def tell(self, message: Drain | PeerDied) -> None:
        assert send_control(self._lifeline, message)

    def wait_for_exit(self, timeout_s: float = 5.0) -> int | None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
        return self.exit_code

    def parent_dies(self) -> None:
        os.close(self._lifeline)
        self._lifeline = None

    def stop(self) -> None:
        if self._lifeline is not None:
            self.parent_dies()
        self.wait_for_exit()
        self.core.ending.set()
        self.core.join(5.0)
