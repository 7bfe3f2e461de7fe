"""What the SDK raises, beside ``protocol.sampling_params.BadRequest`` for bad input."""

from __future__ import annotations


class EngineError(RuntimeError):
    """Something on the engine's side; the message says what and, where possible, what to do."""


class EngineNotRunning(EngineError, ConnectionError):
    """No engine runs at this run directory, or it could not start."""


class EngineDead(EngineError):
    """The engine ended, or lost a process, while requests were open."""


class RequestFailed(EngineError):
    """One request failed in the engine; ``code`` is its kind: "row_error", "memory", …"""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
