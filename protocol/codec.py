"""Bytes to messages and back: typed msgspec, and columns of int32 / float32.

Called by everything that owns a socket.  Decoding is a total function: whatever
arrives becomes a message, a ``Reject`` (a hostile or damaged frame) or an
``Unsupported`` (a well-formed message of a newer peer); it never raises.
"""

from __future__ import annotations

from array import array
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
BLOCK_SIZE_TOKENS = 32
MAX_STREAM_INTERVAL_TOKENS = 2**20      # whoever asks: engine or client

Message = TypeVar("Message")


class Reject(msgspec.Struct, frozen=True, gc=False):
    """A frame that is no message of this protocol; ``reason`` is for the log."""

    reason: str


class Unsupported(msgspec.Struct, frozen=True, gc=False):
    """A well-formed message with a tag that this version does not know."""

    tag: int


class Codec(Generic[Message]):
    """Encodes and decodes one union of tagged structs."""

    def __init__(self, *types: type) -> None:
        union = types[0]
        for other in types[1:]:
            union = union | other
        self._decoder = msgspec.msgpack.Decoder(union)
        self._encoder = msgspec.msgpack.Encoder()
        self._known_tags = frozenset(t.__struct_config__.tag for t in types)

    def encode(self, message: Message) -> bytes:
        return self._encoder.encode(message)

    def decode(self, frame: bytes) -> Message | Reject | Unsupported:
        if len(frame) > MAX_FRAME_BYTES:
            return Reject(f"frame of {len(frame)} bytes; at most {MAX_FRAME_BYTES}")
        try:
            return self._decoder.decode(frame)
        except Exception as error:  # deep nesting raises RecursionError, not DecodeError
            tag = _peek_tag(frame)
            if tag is not None and tag not in self._known_tags:
                return Unsupported(tag)
            return Reject(f"{type(error).__name__}: {error}")


def _peek_tag(frame: bytes) -> int | None:
    """The integer tag of an array-like message, or None."""
    try:
        first = msgspec.msgpack.decode(frame, type=list[msgspec.Raw])[0]
        return msgspec.msgpack.decode(first, type=int)
    except Exception:
        return None


class ColumnError(ValueError):
    """A byte column whose length is not what its row count says."""


def i32_bytes(values: Any) -> bytes:
    """Integers (a flat sequence, or an array) as little-endian int32 bytes; a value outside int32 raises OverflowError."""
    if not isinstance(values, np.ndarray):
        return array("i", values).tobytes()
    if values.dtype == np.int32:
        return values.tobytes()
    if values.size and (values.min() < -(2**31) or values.max() >= 2**31):
        raise OverflowError("value does not fit into int32")
    return values.astype("<i4").tobytes()


def f32_bytes(values: Any) -> bytes:
    """Floats as little-endian float32 bytes."""
    return np.asarray(values, dtype="<f4").tobytes()


def i32_column(data: bytes | None, count: int | None = None, name: str = "column") -> np.ndarray:
    """A read-only int32 view of ``data``; ``count`` values if given (None is none)."""
    return _column(data, count, name, "<i4")


def f32_column(data: bytes | None, count: int | None = None, name: str = "column") -> np.ndarray:
    """A read-only float32 view of ``data``; ``count`` values if given (None is none)."""
    return _column(data, count, name, "<f4")


def _column(data: bytes | None, count: int | None, name: str, dtype: str) -> np.ndarray:
    data = data or b""
    if len(data) % 4:
        raise ColumnError(f"{name}: {len(data)} bytes are no whole number of values")
    if count is not None and len(data) != 4 * count:
        raise ColumnError(f"{name}: {len(data) // 4} values, expected {count}")
    return np.frombuffer(data, dtype=dtype)
