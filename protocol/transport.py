"""ZeroMQ sockets with finite queues and typed frames: one ROUTER end, one DEALER end.

Used by every process that talks; who binds what stands in DESIGN: the core binds for
frontends and for workers, a frontend for SDK clients.  Sends never block: a full queue
or a vanished peer is a return value, and the caller keeps what it could not send.
"""

from __future__ import annotations

import enum
import os
from pathlib import Path

import zmq

from protocol.codec import MAX_FRAME_BYTES

HIGH_WATER_FRAMES = 4096
LINGER_MS = 300


class Sent(enum.Enum):
    """What became of a send."""

    OK = "ok"
    BUSY = "busy"        # the peer's queue is full: try again later
    GONE = "gone"        # no such peer is connected


def ipc(path: Path) -> str:
    """The address of a socket file."""
    return f"ipc://{path}"


class Peers:
    """The binding end (ROUTER): many peers, told apart by routing id."""

    def __init__(self, context: zmq.Context, path: Path) -> None:
        self.path = path
        self.socket = context.socket(zmq.ROUTER)
        _bound(self.socket)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        previous = os.umask(0o077)
        try:
            self.socket.bind(ipc(path))
        finally:
            os.umask(previous)

    def receive(self, limit: int = 64) -> list[tuple[bytes, bytes]]:
        """At most ``limit`` waiting frames as (routing id, frame); never blocks."""
        frames = []
        while len(frames) < limit:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(parts) == 2:
                frames.append((parts[0], parts[1]))
            else:
                frames.append((parts[0], b""))  # decodes to a Reject
        return frames

    def send(self, routing_id: bytes, frame: bytes) -> Sent:
        try:
            self.socket.send_multipart((routing_id, frame), zmq.NOBLOCK)
        except zmq.Again:
            return Sent.BUSY
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        return Sent.OK

    def close(self) -> None:
        """Deliver what is queued (up to LINGER_MS), then remove the socket file."""
        self.socket.close()
        self.path.unlink(missing_ok=True)


class Link:
    """The connecting end (DEALER): one peer."""

    def __init__(self, context: zmq.Context, path: Path, routing_id: bytes) -> None:
        self.socket = context.socket(zmq.DEALER)
        _bound(self.socket)
        self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
        self.socket.connect(ipc(path))

    def receive(self, limit: int = 64) -> list[bytes]:
        """At most ``limit`` waiting frames; never blocks."""
        frames = []
        while len(frames) < limit:
            try:
                frames.append(self.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
        return frames

    def send(self, frame: bytes) -> Sent:
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return Sent.BUSY
        return Sent.OK

    def close(self) -> None:
        self.socket.close()


def new_context() -> zmq.Context:
    return zmq.Context(io_threads=1)


def _bound(socket: zmq.Socket) -> None:
    """Finite queues, bounded frames, quick reconnects."""
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_FRAMES)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_FRAMES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
