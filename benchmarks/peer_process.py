"""The peers: where each is installed, how it is started, and why it may not run.

Each has a virtual environment ``DIR/NAME`` made by ``peers/install.sh`` and an adapter in
``peers/`` that runs under it; transformers runs in our own environment.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ADAPTERS = Path(__file__).resolve().parent / "peers"
KV_CACHE_GB = "4"


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer in one mode."""

    name: str                                 # on the command line
    title: str                                # in tables
    adapter: str                              # file in peers/
    environment_name: str | None              # directory of its virtual environment; None: ours
    one_at_a_time: bool = False
    options: dict[str, Any] = field(default_factory=dict)     # of its adapter's load

    def why_not(self, directory: Path | None) -> str | None:
        """The reason why it cannot be started; None if it can."""
        if self.environment_name is None:
            return None
        if directory is None:
            return "no --peers DIR was given"
        if not (directory / self.environment_name / "installed").is_file():
            return f"not installed in {directory} (benchmarks/peers/install.sh {directory} {self.environment_name})"
        return None

    def python(self, directory: Path | None) -> str:
        return sys.executable if self.environment_name is None else str(directory / self.environment_name / "bin" / "python")

    def command(self, directory: Path | None) -> list[str]:
        return [self.python(directory), str(ADAPTERS / self.adapter)]

    def environment(self, directory: Path | None) -> dict[str, str]:
        """Ours, without our Python path; for vLLM what its CPU build wants."""
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        if self.environment_name == "vllm":
            env |= vllm_environment(directory / "vllm")
        return env


PEERS = {peer.name: peer for peer in (
    Peer("openvino", "OpenVINO GenAI", "openvino_peer.py", "openvino"),
    Peer("openvino_lookup", "OpenVINO GenAI, prompt lookup", "openvino_peer.py", "openvino", options={"prompt_lookup": True}),
    Peer("vllm", "vLLM CPU, bf16", "vllm_peer.py", "vllm"),
    Peer("vllm_auto", "vLLM CPU, bf16, its own binding", "vllm_peer.py", "vllm", options={"own_binding": True}),
    Peer("vllm_float32", "vLLM CPU, float32", "vllm_peer.py", "vllm", options={"dtype": "float32"}),
    Peer("transformers", "transformers, one by one", "transformers_peer.py", None, one_at_a_time=True),
    Peer("transformers_float32", "transformers float32, one by one", "transformers_peer.py", None, one_at_a_time=True,
         options={"dtype": "float32"}),
    Peer("llama_cpp", "llama.cpp", "llama_cpp_peer.py", "llama_cpp"),
)}
DEFAULT_PEERS = ["openvino", "vllm", "transformers", "llama_cpp"]


def vllm_environment(directory: Path) -> dict[str, str]:
    """Memory for its KV cache, no telemetry, and the libraries it wants preloaded, those that are there."""
    wanted = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), directory / "lib" / "libiomp5.so"]
    return {"VLLM_CPU_KVCACHE_SPACE": KV_CACHE_GB, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CACHE_ROOT": str(directory / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(directory / "cache" / "inductor"),
            "LD_PRELOAD": ":".join(str(path) for path in wanted if path.is_file())}
