"""The inherited pipe from a parent to its child: control messages, and its end is the
parent's end.

launch.py holds the writing ends; each child puts the reading end into its poller.
"""

from __future__ import annotations

import os

from protocol.codec import Reject, Unsupported
from protocol.messages import Drain, PeerDied, Resume, from_launch

Control = Drain | PeerDied | Resume


class Lifeline:
    """The child's end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.parent_gone = False
        self._buffer = b""
        os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self.fd

    def receive(self) -> list[Control]:
        """Whole messages that have come; sets ``parent_gone`` at the end of the pipe."""
        while not self.parent_gone:
            try:
                chunk = os.read(self.fd, 65536)
            except BlockingIOError:
                break
            self._buffer += chunk
            self.parent_gone = not chunk
        messages: list[Control] = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "little")
            if len(self._buffer) < 4 + size:
                break
            message = from_launch.decode(self._buffer[4:4 + size])
            self._buffer = self._buffer[4 + size:]
            if not isinstance(message, (Reject, Unsupported)):
                messages.append(message)
        return messages


def send_control(fd: int, message: Control) -> bool:
    """Write to a child; False if it is gone (or has stopped reading)."""
    frame = from_launch.encode(message)
    try:
        os.write(fd, len(frame).to_bytes(4, "little") + frame)
    except (BrokenPipeError, BlockingIOError):
        return False
    return True
