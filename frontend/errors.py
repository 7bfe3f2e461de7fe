"""What the SDK raises, beside ``protocol.sampling_params.BadRequest`` for bad input."""

from __future__ import annotations


class EngineNotRunning(ConnectionError):
    """No engine runs at this run directory; the message names it and says what to do."""


class EngineDead(RuntimeError):
    """The engine ended, or lost a process, while requests were open."""


class RequestFailed(RuntimeError):
    """One request failed in the engine; ``code`` is its kind: "row_error", "memory", …"""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
