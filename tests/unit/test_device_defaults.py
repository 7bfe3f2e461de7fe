"""What the worker says of its device, and what the core makes of it."""

from types import SimpleNamespace

import pytest

from core_proc.engine_core import EngineCore
from gpu_worker.process import Service
from protocol.codec import PROTOCOL_VERSION
from protocol.config import SchedulerConfig
from protocol.steps import Hello, WorkerReady, to_core, to_worker
from protocol.transport import Sent


class Outbox:
    """A link that takes everything."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def send(self, frame: bytes) -> Sent:
        self.frames.append(frame)
        return Sent.OK


def ready_of(device: str) -> WorkerReady:
    """What a worker on ``device`` answers to the Hello of its core."""
    spec = SimpleNamespace(vocab_size=100, eos_token_ids=[2])
    runner = SimpleNamespace(model=SimpleNamespace(spec=spec), states=SimpleNamespace(max_num_seqs=4))
    worker = SimpleNamespace(runner=runner, device=device, numerics_fingerprint="f", num_blocks=8, max_model_len=64, bit_exact=True)
    outbox = Outbox()
    service = Service(SimpleNamespace(page=None, epoch=3, gen=5), worker, outbox)
    service._take(to_worker.encode(Hello(PROTOCOL_VERSION, "core", b"core.e3", 3)))
    answer, = outbox.frames
    return to_core.decode(answer)


@pytest.mark.parametrize(("device", "budget"), [("cpu", 512), ("cuda (NVIDIA H100)", 2048)])
def test_budget_follows_the_workers_device(device, budget):
    core = EngineCore(SchedulerConfig(), ready_of(device))
    assert (core.window, core.memory.budget) == (2, budget)


@pytest.mark.parametrize("device", ["cpu", "cuda (NVIDIA H100)"])
def test_what_the_user_says_goes_first(device):
    core = EngineCore(SchedulerConfig(window=1, max_num_batched_tokens=99), ready_of(device))
    assert (core.window, core.memory.budget) == (1, 99)
