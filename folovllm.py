"""FoloVLLM's public names in one place.

The packages beside this file have general names (``frontend``, ``protocol``), so its own
directory goes first on the path while they are imported, and away again after.
"""

import platform
import sys
from pathlib import Path

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    raise ImportError(f"FoloVLLM runs on Linux x86-64; this is {sys.platform} {platform.machine()}")

_root = str(Path(__file__).resolve().parent)
sys.path.insert(0, _root)
try:
    from frontend.client import AsyncClient, Client
    from frontend.errors import EngineDead, EngineNotRunning, RequestFailed
    from frontend.llm_engine import LLM, LLMEngine
    from frontend.outputs import CompletionOutput, RequestOutput
    from protocol.config import ModelConfig, SchedulerConfig
    from protocol.sampling_params import BadRequest, SamplingParams
finally:
    sys.path.remove(_root)

__version__ = "0.1.0"
__all__ = [
    "AsyncClient", "BadRequest", "Client", "CompletionOutput", "EngineDead", "EngineNotRunning", "LLM",
    "LLMEngine", "ModelConfig", "RequestFailed", "RequestOutput", "SamplingParams", "SchedulerConfig",
]
