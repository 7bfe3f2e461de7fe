"""The wire: golden bytes of every message, and decoding as a total function.

A change of the golden bytes is a change of the protocol: raise PROTOCOL_VERSION with it.
"""

import random

import msgspec
import numpy as np
import pytest

from protocol import messages as m
from protocol import steps as s
from protocol.codec import (
    MAX_FRAME_BYTES, ColumnError, Reject, Unsupported, f32_bytes, f32_column, i32_bytes, i32_column,
)
from protocol.sampling_params import SamplingParams, TokenParams, to_wire

KEY = bytes(range(16))
PARAMS = TokenParams(max_tokens=4)
WIRE = to_wire(SamplingParams())
ROWS = s.LogprobRows(1, i32_bytes([7]), f32_bytes([-1]), i32_bytes([1]))

# message, its codec, its bytes as hex: array, tag, fields in order, None as c0.
GOLDEN = [
    (s.Hello(1, "core", b"c0.e1", 1), s.to_worker, "95 01 01 a4636f7265 c40563302e6531 01"),
    (s.StepPlan(1, 2, 3, None, [s.Admission(0, i32_bytes([5]), 1, 0, i32_bytes([9]), PARAMS, 8)],
                b"", i32_bytes([0]), i32_bytes([0]), i32_bytes([1])), s.to_worker,
     "9f 02 01 02 03 c0 91 99 00 c40405000000 01 00 c40409000000"
     " dc0013 04 00 cb3ff0000000000000 00 cb3ff0000000000000 cb0000000000000000 cb3ff0000000000000"
     " cb0000000000000000 cb0000000000000000 c2 c400 c400 c400 c0 c400 c400 c0 c0 c400"
     " 08 c0 c0 c400 c40400000000 c40400000000 c40401000000 c0 c0 01 c0 c0"),
    (s.WorkerReady(1, 2, "f", 10, 4, 100, i32_bytes([2]), ["cuda"], 128, True), s.to_core,
     "9b 03 01 02 a166 0a 04 64 c40402000000 91a463756461 cc80 c3"),
    (s.Fences(1, 2, i32_bytes([3])), s.to_core, "94 04 01 02 c40403000000"),
    (s.StepResult(1, 2, 3, s.StepStatus.OK, i32_bytes([1]), i32_bytes([7]), logprobs=ROWS), s.to_core,
     "9d 05 01 02 03 00 c40401000000 c40407000000 c0 94 01 c40407000000 c404000080bf c40401000000 c0 c0 c0 c0"),
    (m.Add(1, KEY, 2, 0, 1, 0, False, 3, i32_bytes([5]), b"", PARAMS, 8, 0, b"c", b"h"), m.to_core,
     "dc0018 0a 01 c410000102030405060708090a0b0c0d0e0f 02 00 01 00 c2 03 c40405000000 c400"
     " dc0013 04 00 cb3ff0000000000000 00 cb3ff0000000000000 cb0000000000000000 cb3ff0000000000000"
     " cb0000000000000000 cb0000000000000000 c2 c400 c400 c400 c0 c400 c400 c0 c0 c400"
     " 08 00 c40163 c40168 00 01 c0 c0 c0 c0 c0 c0"),
    (m.Abort(1, KEY, None, 1, 0), m.to_core, "96 0b 01 c410000102030405060708090a0b0c0d0e0f c0 01 00"),
    (m.ResumeDone(1), m.to_core, "92 0c 01"),
    (m.Sync(1, i32_bytes([1, 2]), 5), m.to_core, "94 0d 01 c4080100000002000000 05"),
    (m.Heartbeat(3, 3, 2), m.to_frontend, "94 0e 03 03 02"),
    (m.EngineReady(1, 1, 2, 128, 10, 32, 100, i32_bytes([2]), "f", True), m.to_frontend,
     "9b 14 01 01 02 cc80 0a 20 64 c40402000000 a166 c3"),
    (m.Accepted(1, 2), m.to_frontend, "93 15 01 02"),
    (m.Rejected(1, 2, "c", "f", "m"), m.to_frontend, "96 16 01 02 a163 a166 a16d"),
    (m.Outputs(1, i32_bytes([2]), i32_bytes([0]), i32_bytes([1]), i32_bytes([7]), b"\1", i32_bytes([-1])),
     m.to_frontend, "9c 17 01 c40402000000 c40400000000 c40401000000 c40407000000 c40101 c404ffffffff c0 c0 c0 c0"),
    (m.Generate(KEY, "hi", None, None, WIRE), m.from_sdk,
     "dc0014 1e c410000102030405060708090a0b0c0d0e0f a26869 c0 c0"
     " dc0016 01 10 00 c0 c0 c0 c0 c0 cb0000000000000000 cb0000000000000000 c400 c400 c0 90 90 c400 c2 c0 c0 c3 c2 c3"
     " 00 00 01 00 c0 c0 c400 c0 c0 c0 c0 c0 c0 c0"),
    (m.AbortStream(KEY, 1), m.from_sdk, "93 1f c410000102030405060708090a0b0c0d0e0f 01"),
    (m.Connect(1), m.from_sdk, "92 20 01"),
    (m.Welcome(1, "m", 128, 100, True, "f"), m.to_sdk, "97 28 01 a16d cc80 64 c3 a166"),
    (m.Error(KEY, 0, "c", "f", "m"), m.to_sdk, "96 2a c410000102030405060708090a0b0c0d0e0f 00 a163 a166 a16d"),
    (m.Delta(KEY, 0, 0, i32_bytes([7]), 0, "x", finish_reason="stop", usage=m.Usage(1, 1, 0)), m.to_sdk,
     "9f 2b c410000102030405060708090a0b0c0d0e0f 00 00 c40407000000 00 a178 c0 c0 a473746f70 c0 93 01 01 00 c0 c0 c0"),
    (m.Ping(), m.to_sdk, "91 2c"),
    (m.Drain(1.0), m.from_launch, "92 32 cb3ff0000000000000"),
    (m.PeerDied("core", b"c0.e1"), m.from_launch, "93 33 a4636f7265 c40563302e6531"),
    (m.Resume([b"w0.g1"], [KEY]), m.from_launch, "93 34 91c40577302e6731 91c410000102030405060708090a0b0c0d0e0f"),
]


def _name(case: object) -> str:
    return type(case).__name__ if isinstance(case, msgspec.Struct) else ""


@pytest.mark.parametrize(("message", "codec", "golden"), GOLDEN, ids=_name)
def test_golden_bytes(message, codec, golden):
    frame = bytes.fromhex(golden.replace(" ", ""))
    assert codec.encode(message).hex() == frame.hex()
    assert codec.decode(frame) == message


def test_unknown_tag_is_unsupported_not_hostile():
    frame = msgspec.msgpack.encode([99, "whatever", {"of": "a newer peer"}])
    assert s.to_worker.decode(frame) == Unsupported(99)


def test_older_peer_sends_fewer_fields():
    """New fields are appended last, with defaults."""
    frame = msgspec.msgpack.encode([5, 1, 1, 1, 0])
    assert s.to_core.decode(frame) == s.StepResult(1, 1, 1, s.StepStatus.OK)


def test_deep_nesting_is_rejected():
    assert isinstance(s.to_worker.decode(b"\x91" * 100_000), Reject)


def test_too_large_frame_is_rejected():
    assert isinstance(s.to_worker.decode(b"\0" * (MAX_FRAME_BYTES + 1)), Reject)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0, -1.0])
def test_floats_have_bounds(value):
    """Without bounds NaN would pass."""
    broken = msgspec.structs.replace(PARAMS, temperature=value)
    frame = msgspec.msgpack.encode([10, 1, KEY, 2, 0, 1, 0, False, 3, b"", b"", broken, 8, 0, b"c", b"h"])
    assert isinstance(m.to_core.decode(frame), Reject)


def test_decoding_never_raises():
    """Random bytes, and golden frames with random damage."""
    generator = random.Random(0)
    codecs = (s.to_worker, s.to_core, m.to_core, m.to_frontend, m.from_sdk, m.to_sdk, m.from_launch)
    frames = [codec.encode(message) for message, codec, _ in GOLDEN]
    for _ in range(3000):
        frame = bytearray(generator.choice(frames)) if generator.random() < 0.8 else bytearray(generator.randbytes(40))
        for _ in range(generator.randint(0, 4)):
            frame[generator.randrange(len(frame))] = generator.randrange(256)
        cut = bytes(frame[:generator.randint(0, len(frame))]) if generator.random() < 0.3 else bytes(frame)
        for codec in codecs:
            assert isinstance(codec.decode(cut), msgspec.Struct)


def test_columns_check_their_length():
    assert i32_column(i32_bytes([1, -2]), 2).tolist() == [1, -2]
    assert f32_column(f32_bytes([0.5]), 1).tolist() == [0.5]
    assert i32_column(None).size == 0
    with pytest.raises(ColumnError, match="rows: 2 values, expected 3"):
        i32_column(i32_bytes([1, 2]), 3, "rows")
    with pytest.raises(ColumnError, match="5 bytes"):
        i32_column(b"12345")


def test_integers_outside_int32_do_not_wrap():
    for value in (2**31, -(2**31) - 1):
        with pytest.raises(OverflowError):
            i32_bytes([value])
    assert i32_bytes(np.array([2**31 - 1], dtype=np.int64)) == b"\xff\xff\xff\x7f"
