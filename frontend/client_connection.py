"""One client's socket to a frontend, with its session: what both kinds of client share.

Base of ``Client`` and ``AsyncClient`` (``client``), which add the waiting.  Nothing here
waits.  Must stay true: a client never waits for an engine that is gone (``_look``), and
never touches a socket that it inherited through a fork.
"""

from __future__ import annotations

import os
import time
from typing import Any

from frontend.client_session import ClientSession
from frontend.errors import EngineDead, EngineError, EngineNotRunning
from frontend.status import cause_of_death, launch_pid, no_engine
from protocol.run_dir import RunDir, locate
from protocol.transport import Link, Sent, new_context

SILENCE_S = 1.0              # without a frame while waiting: look whether the engine lives
CONNECT_TIMEOUT_S = 120.0
DRAIN_FRAMES = 64            # taken from the socket before anything else gets a turn


class ClientConnection:
    """The socket of one client and its session; what both kinds of client share."""

    def __init__(self, run_dir: str | RunDir | None, seed: int | None) -> None:
        self.run_dir = run_dir if isinstance(run_dir, RunDir) else locate(run_dir)
        if launch_pid(self.run_dir) is None:
            raise EngineNotRunning(no_engine(self.run_dir))
        self.session = ClientSession(seed)
        self._pid = os.getpid()
        self._context = new_context()
        self._link = Link(self._context, self.run_dir.client_socket, b"c" + os.urandom(8))
        self._closed = False
        self._heard_s = time.monotonic()

    @property
    def model(self) -> str:
        """The model's name."""
        return self._greeting("model")

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self._greeting("max_model_len")

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints promise equal tokens for equal requests."""
        return self._greeting("numerics_fingerprint")

    def _greeting(self, name: str) -> Any:
        if self.session.welcome is None:
            raise EngineError("not connected yet: await connect() first")
        return getattr(self.session.welcome, name)

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise EngineError("this client belongs to the process that made it; make another one after a fork")
        if self._closed:
            raise EngineError("this client is closed")
        if self.session.fatal is not None:
            raise self.session.fatal

    def _push(self) -> None:
        """Send what the outbox holds, as far as the queue takes it."""
        outbox = self.session.outbox
        while outbox and self._link.send(outbox[0]) is Sent.OK:
            outbox.popleft()

    def _pull(self) -> bool:
        """Take in waiting frames; whether there may be more."""
        frames = self._link.receive(DRAIN_FRAMES)
        for frame in frames:
            self.session.receive(frame)
        if frames:
            self._heard_s = time.monotonic()
        return len(frames) == DRAIN_FRAMES

    def _look(self) -> None:
        """After a second of silence: is there still somebody who could answer?"""
        if time.monotonic() - self._heard_s < SILENCE_S:
            return
        self._heard_s = time.monotonic()
        cause = cause_of_death(self.run_dir)
        if cause is not None:
            while self._pull():
                pass      # what it said before it died still counts
            self.session.die(EngineDead(cause))

    def _not_welcomed(self, timeout_s: float) -> EngineNotRunning:
        return EngineNotRunning(f"the engine at {self.run_dir.path} was not ready within {timeout_s:g} s")

    def _close(self) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self.session.abort_all()
        if self.session.fatal is None:
            self._push()
        self._link.close()
        self._context.term()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self._close()
