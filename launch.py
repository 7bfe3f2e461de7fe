"""``python launch.py``: the parent of all processes of one engine.

Owns the run directory's lock, the settings and the life of its children: core, worker
and frontend.  Starts them, waits until each says READY in its progress page, ends them.
No torch, one thread, asleep but for signals and deaths.  Flags: ``--help``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Mapping

if (sys.platform, platform.machine()) != ("linux", "x86_64"):     # before imports that other platforms lack
    sys.exit(f"folovllm: error: FoloVLLM runs on Linux x86-64; this is {sys.platform} {platform.machine()}")

import msgspec

from protocol import config as settings
from protocol import thread_settings
from protocol.child import routing_id, set_process_name
from protocol.config import ConfigError, EngineConfig
from protocol.lifeline import send_control
from protocol.messages import Drain, PeerDied
from protocol.parent_death import EXIT_PEER_LOST
from protocol.progress import ProgressPage, State
from protocol.run_dir import RunDir, RunDirError, locate
from protocol.transport import ipc

ROOT = Path(__file__).resolve().parent
MODULES = {"worker": "gpu_worker.process", "core": "core_proc.process", "frontend": "frontend.process"}
TORCH_RANGE = ((2, 11), (3, 0))
PAGE_POLL_S = 0.01          # while starting
FRONTEND_LEAVES_S = 0.8     # beyond its grace: to tell its clients
OTHERS_LEAVE_S = 0.5
SHOW_CURSOR = "\x1b[?25h"
EPOCH = GEN = 1             # incarnations; they rise when a child is replaced


class StartError(RuntimeError):
    """The engine cannot start; the message is for the user."""


class Stop(Exception):
    """A signal came, or the program that started us is gone."""


@dataclass(slots=True)
class Child:
    """One process started by us, and the writing end of its lifeline."""

    role: str
    process: subprocess.Popen
    lifeline: int

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def told(self, message: Drain | PeerDied) -> None:
        send_control(self.lifeline, message)


class Wakeups:
    """Everything that ends our sleep: SIGINT, SIGTERM, SIGCHLD, and the death pipe."""

    def __init__(self, death_fd: int | None) -> None:
        self._read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._read, select.POLLIN)
        self._death_fd = death_fd
        if death_fd is not None:
            self._poll.register(death_fd, select.POLLIN)

    def sleep(self, timeout_s: float | None) -> None:
        """Until something happens; raises Stop if that is the end."""
        ready = self._poll.poll(None if timeout_s is None else max(0, timeout_s) * 1000)
        for fd, _events in ready:
            if fd == self._death_fd and not os.read(fd, 1):
                self._poll.unregister(fd)
                raise Stop("the program that started the engine is gone")
            if fd == self._read and set(os.read(fd, 64)) & {signal.SIGINT, signal.SIGTERM}:
                raise Stop("signal")

    def sleep_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Until ``done()`` or the time is over; False then."""
        deadline = time.monotonic() + timeout_s
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.sleep(min(left, 0.1))
        return True


class Engine:
    """The children of one engine, from the first start to the last exit."""

    def __init__(self, config: EngineConfig, run_dir: RunDir, wakeups: Wakeups) -> None:
        self.config = config
        self.run_dir = run_dir
        self.wakeups = wakeups
        self.children: dict[str, Child] = {}
        self.page = ProgressPage.create(run_dir.page("launch"), "launch", epoch=EPOCH, gen=GEN)

    def start(self) -> dict:
        """Start everything; returns what the ready line says.  Raises StartError, Stop."""
        began = time.monotonic()
        self.config = resolve_model(self.config, self.wakeups)
        self.run_dir.write_config(self.config)
        self.page.set("state", State.LOADING)
        say_replaced(os.environ)
        for role in MODULES:
            self.children[role] = start_child(role, self.run_dir)
        for role in MODULES:
            self._await_ready(role)
        self.page.set("state", State.READY)
        return self._facts(time.monotonic() - began)

    def watch(self) -> int:
        """Sleep until a child dies: the exit code then.  Raises Stop."""
        while all(child.alive for child in self.children.values()):
            self.wakeups.sleep(None)
        return EXIT_PEER_LOST

    def stop(self, grace_s: float) -> None:
        """Frontend first, so that every client is told; then the others.  Who is not ready yet does not
        listen, and is killed at once."""
        serving = self.page.get("state") == State.READY
        self.page.set("state", State.DRAINING)
        frontend = self.children.get("frontend")
        for role, child in self.children.items():
            if serving and not child.alive:
                say(f"{role} (pid {child.process.pid}) {how_it_ended(child.process.returncode)};"
                    " every open stream ends with engine_lost")
                frontend.told(PeerDied(role, routing_id(role, 0, EPOCH, GEN)))
        try:
            if serving:
                self._leave([frontend], grace_s, FRONTEND_LEAVES_S)
                self._leave(list(self.children.values()), 0.0, OTHERS_LEAVE_S)
        except Stop:
            pass  # a second signal: at once
        for child in self.children.values():
            if child.alive:
                child.process.kill()
            child.process.wait()
            os.close(child.lifeline)

    def _leave(self, children: list[Child], grace_s: float, extra_s: float) -> None:
        for child in children:
            child.told(Drain(grace_s))
        self.wakeups.sleep_until(lambda: not any(c.alive for c in children), grace_s + extra_s)

    def _await_ready(self, role: str) -> None:
        child = self.children[role]
        while self._state(role) != State.READY:
            for other in self.children.values():
                if not other.alive:
                    raise StartError(self._why(other))
            self.wakeups.sleep(PAGE_POLL_S)
        if not child.alive:
            raise StartError(self._why(child))

    def _state(self, role: str) -> State:
        page = self._page_of(role)
        return State.STARTING if page is None else State(page.get("state"))

    def _page_of(self, role: str) -> ProgressPage | None:
        try:
            return ProgressPage(self.run_dir.page(role))
        except (OSError, ValueError):
            return None

    def _why(self, child: Child) -> str:
        page = self._page_of(child.role)
        told = page.get_text("error") if page else ""
        where = "" if child.process.returncode < 0 else "; what it said, if anything, is above"     # a signal leaves no word
        return told or f"{child.role} {how_it_ended(child.process.returncode)} while starting{where}"

    def _facts(self, seconds: float) -> dict:
        worker = self._page_of("worker")
        return {
            "ready": True, "seconds": round(seconds, 2), "pid": os.getpid(),
            "model": self.config.model_name, "device": worker.get_text("device"),
            "dtype": worker.get_text("dtype"),
            "kv_tokens": worker.get("blocks") * self.config.scheduler.block_size,
            "max_model_len": worker.get("max_model_len"), "threads": worker.get("num_threads"),
            "zmq": ipc(self.run_dir.client_socket),
        }


def start_child(role: str, run_dir: RunDir) -> Child:
    """One child with the reading end of a fresh pipe as its lifeline."""
    read_end, write_end = os.pipe()
    arguments = ["--run-dir", str(run_dir.path), "--lifeline-fd", str(read_end),
                 "--rank", "0", "--epoch", str(EPOCH), "--gen", str(GEN)]
    process = spawn(MODULES[role], arguments, pass_fds=(read_end,), env=environment(role))
    os.close(read_end)
    os.set_blocking(write_end, False)
    return Child(role, process, write_end)


def spawn(module: str, arguments: list[str], **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-P", "-m", module, *arguments], close_fds=True,
                            start_new_session=True, stdin=subprocess.DEVNULL, **options)


def environment(role: str) -> dict[str, str]:
    """Ours, with this directory first on the path, and threads where they belong."""
    env = thread_settings.with_own_threads(os.environ, role)
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), env.get("PYTHONPATH")) if p)
    env["PYTHONUNBUFFERED"] = "1"
    return env


def say_replaced(environ: Mapping[str, str]) -> None:
    """One line about the user's settings that the worker does not get."""
    names = " ".join(f"{name}={value}" for name, value in thread_settings.replaced(environ).items())
    if names:
        say(f"the worker's threads are set up by the engine (their number: --num-threads), not by {names}")


def resolve_model(config: EngineConfig, wakeups: Wakeups) -> EngineConfig:
    """``config`` with a checkpoint directory on this machine.

    Fetching and converting happens in a short-lived child, whose last line is the directory,
    or the reason why there is none; what it says on stderr the user sees.
    """
    model = config.model.model
    path = Path(model).expanduser()
    if model == "default":
        directory = run_resolver("gpu_worker.models.default_model", [], wakeups)
        name = "SmolLM2-135M-Instruct"
    elif path.is_file():
        directory, name = run_resolver("gpu_worker.models.gguf_checkpoint", [str(path)], wakeups), path.stem
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise StartError(f"model: the directory {path} has no config.json; a Hugging Face checkpoint is needed")
        directory, name = str(path.absolute()), path.absolute().name
    elif model.startswith((".", "/", "~")) or model.count("/") != 1 or model.endswith(".gguf"):
        raise StartError(f"model: was {model!r}, which is no directory and no file here;"
                         " allowed: 'default', a checkpoint directory, a GGUF file or a hub id (owner/name)")
    else:
        directory, name = run_resolver("gpu_worker.models.hub_model", [model], wakeups), model
    return msgspec.structs.replace(config, model_dir=directory, model_name=name)


def run_resolver(module: str, arguments: list[str], wakeups: Wakeups) -> str:
    process = spawn(module, arguments, stdout=subprocess.PIPE, env=environment("resolver"))
    try:
        while process.poll() is None:
            wakeups.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if sys.stderr.isatty():
                print(SHOW_CURSOR, end="", file=sys.stderr, flush=True)     # its progress bar had hidden it
    lines = process.stdout.read().decode().splitlines()
    if process.returncode < 0:
        raise StartError(f"model: the process that fetches and converts it {how_it_ended(process.returncode)}")
    if process.returncode or not lines:
        raise StartError(f"model: {lines[-1] if lines else 'could not be fetched or converted; the reason, if one was given, is above'}")
    return lines[-1]


def how_it_ended(returncode: int) -> str:
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"exited with code {returncode}"


def check_torch() -> None:
    """A version that we know, before anything is started."""
    needed = "FoloVLLM needs at least 2.11 and less than 3"
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise StartError(f"torch is not installed; {needed}") from None
    version = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if not TORCH_RANGE[0] <= version < TORCH_RANGE[1]:
        raise StartError(f"torch {found} is installed; {needed}")


def say(text: str) -> None:
    print(f"folovllm: {text}", file=sys.stderr, flush=True)


def report(fd: int | None, facts: dict) -> None:
    """One JSON line to the program that started us."""
    if fd is None:
        return
    try:
        os.write(fd, json.dumps(facts).encode() + b"\n")
        os.close(fd)
    except OSError:
        pass  # it is gone; the death pipe tells


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.py", description="Start a FoloVLLM engine and keep it until Ctrl-C.", allow_abbrev=False,
        epilog="Talk to it with 'folovllm chat', the SDK (folovllm.Client), 'folovllm status'.")
    settings.add_arguments(parser)
    for name in ("--death-pipe-fd", "--parent-report-fd"):  # LLMEngine's
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def serve(config: EngineConfig, arguments: argparse.Namespace) -> int:
    """One engine from start to end; the exit code."""
    wakeups = Wakeups(arguments.death_pipe_fd)
    run_dir = locate(config.run.run_dir)
    lock = run_dir.create_and_lock()
    try:
        return run(Engine(config, run_dir, wakeups), arguments.parent_report_fd)
    finally:
        lock.release()


def run(engine: Engine, report_fd: int | None) -> int:
    """From the start of the children to their end; the exit code."""
    grace_s = 0.0
    try:
        facts = engine.start()
        report(report_fd, facts)
        if report_fd is None:
            print(f"ready in {facts['seconds']:.1f} s  " + " ".join(
                f"{name}={facts[name]}" for name in
                ("model", "device", "dtype", "kv_tokens", "threads", "zmq")), flush=True)
        return engine.watch()
    except Stop as stop:
        grace_s = engine.config.run.shutdown_timeout if str(stop) == "signal" else 0.0
        return 0
    finally:
        engine.stop(grace_s)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    set_process_name("folovllm: launch")
    try:
        check_torch()
        return serve(settings.from_arguments(arguments), arguments)
    except (StartError, ConfigError, RunDirError) as error:
        return refuse(str(error), arguments.parent_report_fd)
    except OSError as error:      # a full disk, mostly
        return refuse(f"{error.filename or 'cannot go on'}: {error.strerror}", arguments.parent_report_fd)


def refuse(reason: str, report_fd: int | None) -> int:
    """Say it once: to the program that started us, which raises it, else on the terminal."""
    if report_fd is None:
        say(f"error: {reason}")
    report(report_fd, {"error": reason})
    return 1


if __name__ == "__main__":
    sys.exit(main())
